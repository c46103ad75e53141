from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from lightning_fscreen.candidates.weights import find_weights
from lightning_fscreen.modules import select


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        self.head = nn.Linear(4, 2)


def names(model, **patterns):
    return [candidate.name for candidate in find_weights(model, **patterns)[0]]


def test_linear_and_convolution_layers_are_found_in_the_order_of_the_modules():
    model = Network()
    found, excluded = find_weights(model)
    assert [candidate.name for candidate in found] == ["stem", "body.0", "body.2", "head"]
    assert all(candidate.weight is model.get_submodule(candidate.name).weight for candidate in found)
    assert excluded == {}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"include": "body.*"}, ["body.0", "body.2"]),
        ({"include": ["stem", "head"]}, ["stem", "head"]),
        ({"exclude": "head"}, ["stem", "body.0", "body.2"]),
        ({"exclude": ["*.0", "stem"]}, ["body.2", "head"]),
        ({"include": "body*", "exclude": "*2"}, ["body.0"]),
        ({"include": "body.[0-1]"}, ["body.0"]),
        ({"include": ()}, None),
    ],
)
def test_patterns_select_layers_and_say_why_the_others_are_left_out(patterns, expected):
    model = Network()
    if expected is None:
        with pytest.raises(ValueError, match="nothing to prune"):
            find_weights(model, **patterns)
        return
    found, excluded = find_weights(model, **patterns)
    assert [candidate.name for candidate in found] == expected
    assert set(excluded) == {"stem", "body.0", "body.2", "head"} - set(expected)
    assert all("left out by" in reason for reason in excluded.values())


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["fc*", "HEAD", "body.1"])
def test_a_pattern_that_matches_nothing_is_an_error_that_lists_the_layers(argument, pattern):
    patterns = {argument: ["*", pattern] if argument == "include" else pattern}
    with pytest.raises(ValueError, match=argument) as error:
        find_weights(Network(), **patterns)
    assert repr(pattern) in str(error.value)
    assert "['stem', 'body.0', 'body.2', 'head']" in str(error.value)


def test_select_gives_the_reason_of_include_before_that_of_exclude():
    assert select("abc", None, None) == {}
    assert select("abc", "a", "b") == {
        "b": "left out by include=['a']",
        "c": "left out by include=['a']",
    }


def lazy():
    return nn.Sequential(nn.LazyLinear(3), nn.LazyConv2d(3, 1))


def replaced_by_old_weight_norm():
    with pytest.warns(FutureWarning):
        return weight_norm(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.Linear(2, 2).requires_grad_(False), "frozen"),
        (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), "parametrization"),
        (lambda: parametrizations.spectral_norm(nn.Conv2d(2, 2, 1)), "parametrization"),
        (lambda: prune.l1_unstructured(nn.Linear(2, 2), "weight", 1), "not a parameter"),
        (replaced_by_old_weight_norm, "not a parameter"),
        (lambda: nn.MultiheadAttention(4, 2), "ttention"),
        (lazy, "lazy"),
    ],
)
def test_what_cannot_be_pruned_is_left_out_with_a_reason(make, said):
    left_out = make()
    found, excluded = find_weights(nn.ModuleDict({"odd": left_out, "plain": nn.Linear(2, 2)}))
    assert [candidate.name for candidate in found] == ["plain"]
    assert excluded
    assert all(said in reason for reason in excluded.values())
    with pytest.raises(ValueError, match=f"nothing to prune in {type(left_out).__name__}") as error:
        find_weights(left_out)
    assert said in str(error.value)


def test_a_model_without_layers_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="nothing to prune in ReLU: it has no linear and convolution layers"):
        find_weights(nn.ReLU())


def test_the_linear_layers_around_attention_are_candidates():
    layer = nn.TransformerEncoderLayer(4, 2, 8)
    found, excluded = find_weights(layer)
    assert [candidate.name for candidate in found] == ["linear1", "linear2"]
    assert list(excluded) == ["self_attn.out_proj", "self_attn.in_proj_weight"]


def test_weights_of_other_layers_are_listed():
    net = nn.ModuleDict(
        {"embed": nn.Embedding(4, 3), "rnn": nn.GRU(3, 3), "pair": nn.Bilinear(3, 3, 2), "fc": nn.Linear(3, 4)}
    )
    net.fc.weight = net.embed.weight
    found, excluded = find_weights(net)
    assert [candidate.name for candidate in found] == ["fc"]
    assert list(excluded) == ["embed.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "pair.weight"]
    assert excluded["embed.weight"] == "the weight of 'fc', which Embedding shares"
    assert "GRU: only weights of linear and convolution layers" in excluded["rnn.weight_ih_l0"]


def test_a_module_used_under_two_names_is_one_candidate():
    model = nn.Module()
    model.first = model.second = nn.Linear(3, 3)
    assert names(model) == ["first"]


def tied():
    model = nn.Module()
    model.first, model.second = nn.Linear(3, 3), nn.Linear(3, 3)
    model.second.weight = model.first.weight
    return model


def test_a_weight_shared_by_two_layers_is_one_candidate_and_the_other_names_it():
    found, excluded = find_weights(tied())
    assert [candidate.name for candidate in found] == ["first"]
    assert "'first'" in excluded["second"]


@pytest.mark.parametrize(("excluded_layer", "other"), [("first", "second"), ("second", "first")])
def test_excluding_a_layer_protects_its_weight_under_every_name(excluded_layer, other):
    model = tied()
    with pytest.raises(ValueError, match="nothing to prune") as error:
        find_weights(model, exclude=excluded_layer)
    assert other in str(error.value)


def test_finding_changes_nothing():
    model = Network()
    before = copy.deepcopy(model.state_dict())
    find_weights(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
