from __future__ import annotations

import copy
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_fscreen as fs
from tests.test_functional import assert_equals_sklearn

Named = namedtuple("Named", "image label index")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 6)
        self.bn1d = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, image, scale=1.0):
        x = torch.relu(self.bn(self.conv(image * scale))).mean((2, 3))
        return self.head(self.drop(torch.relu(self.bn1d(self.fc(x)))))


def network():
    torch.manual_seed(0)
    model = Network().double()
    for bn in (model.bn, model.bn1d):
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
        nn.init.normal_(bn.running_mean, std=0.1)
    return model


def data(n=50):
    rng = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (n,), generator=rng)
    return torch.randn(n, 2, 6, 6, generator=rng, dtype=torch.float64) + 0.3 * labels.view(-1, 1, 1, 1), labels


def loader(n=50, batch_size=8):
    return DataLoader(TensorDataset(*data(n)), batch_size)


@pytest.mark.parametrize("compiled", [torch.compile, lambda model: model.compile() or model])
def test_a_compiled_network_that_has_run_is_screened_as_it_was_written(compiled):
    model = network().eval()
    expected = fs.screen(model, loader(), progress=False)
    model = compiled(model)
    with torch.no_grad():
        model(data()[0])
    found = fs.screen(model, loader(), progress=False)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def reference():
    """Explicit forward hooks on a model in eval mode, all instances at once."""
    model, seen = network().eval(), {}
    for name in ("conv", "fc", "head"):
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    for name in ("bn", "bn1d"):
        model.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        model(data()[0])
    return {name: x.mean((2, 3)) if x.ndim == 4 else x for name, x in seen.items()}


def assert_screened(result, names=("conv", "bn", "fc", "bn1d", "head")):
    assert list(result) == list(names)
    for name, features in reference().items():
        if name in names:
            assert_equals_sklearn(result[name], features, data()[1])


def test_it_equals_f_classif_of_explicit_hooks():
    assert_screened(fs.screen(network(), loader(), num_classes=3, progress=False))


def test_the_number_of_classes_is_inferred_from_the_last_linear_layer():
    assert_screened(fs.screen(network(), loader(), progress=False))


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_the_size_of_the_batches_does_not_matter(batch_size):
    assert_screened(fs.screen(network(), loader(batch_size=batch_size), progress=False))


def fingerprint(model):
    modules = list(model.modules())
    hooks = [{key: dict(value) for key, value in vars(module).items() if "hooks" in key} for module in modules]
    return [module.training for module in modules], hooks, copy.deepcopy(model.state_dict())


def assert_untouched(model, before):
    modes, hooks, state = fingerprint(model)
    assert modes == before[0]
    assert hooks == before[1]
    torch.testing.assert_close(state, before[2], rtol=0, atol=0)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_modes_hooks_buffers_and_random_numbers_are_left_as_they_were(fails):
    model = network()
    model.bn.eval()
    model.head.register_forward_hook(lambda module, args, output: None)
    before, batches = fingerprint(model), [tuple(batch) for batch in loader()]
    if fails:
        batches.append((torch.zeros(3, 99, 6, 6), torch.zeros(3, dtype=torch.long)))
    state = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError):
            fs.screen(model, batches, progress=False)
    else:
        fs.screen(model, batches, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y, torch.arange(len(y))],
        lambda x, y: Named(x, y, torch.arange(len(y))),
        lambda x, y: {"image": x, "label": y},
        lambda x, y: {"pixel_values": x, "targets": y},  # a single input is passed by position
        lambda x, y: {"label": y, "image": x, "scale": torch.ones((), dtype=x.dtype)},  # several by name
    ],
)
def test_batches_of_every_usual_kind_are_understood(make):
    batches = [make(*batch) for batch in loader()]
    assert_screened(fs.screen(network(), batches, progress=False))


def test_labels_and_forward_say_what_cannot_be_guessed():
    batches = [{"class": y, "views": (x, x)} for x, y in loader()]
    result = fs.screen(
        network(),
        batches,
        labels=lambda batch: batch["class"],
        forward=lambda model, batch: model(batch["views"][0]),
        progress=False,
    )
    assert_screened(result)


def test_labels_alone_are_enough_to_tell_the_input_of_a_dict():
    batches = [{"image": x, "class": y} for x, y in loader()]
    assert_screened(fs.screen(network(), batches, labels=lambda batch: batch["class"], progress=False))


def test_one_hot_labels_equal_hard_ones():
    batches = [(x, nn.functional.one_hot(y, 3).double()) for x, y in loader()]
    assert_screened(fs.screen(network(), batches, progress=False))


def test_class_weights_say_the_number_of_classes():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).double()
    batches = [(x, nn.functional.one_hot(y, 3).double()) for x, y in loader()]
    expected = fs.screen(model, batches, num_classes=3, progress=False)
    result = fs.screen(model, batches, progress=False)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ({"exclude": "head"}, ["conv", "bn", "fc", "bn1d"]),
        ({"exclude": ["bn*", "conv"]}, ["fc", "head"]),
        ({"include": "bn*"}, ["bn", "bn1d"]),
    ],
)
def test_patterns_select_layers(patterns, names):
    assert_screened(fs.screen(network(), loader(), progress=False, **patterns), names)


def test_what_layers_do_in_place_afterwards_does_not_reach_the_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    plain = copy.deepcopy(model)
    plain[2].inplace = False
    batches = [(torch.randn(40, 4), torch.arange(40) % 3)]
    inplace, expected = (fs.screen(m, batches, progress=False) for m in (model, plain))
    for name in expected:
        torch.testing.assert_close(inplace[name], expected[name])


def test_attention_is_not_in_the_way():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    batches = [(torch.randn(30, 5, 4), torch.arange(30) % 3)]
    assert list(fs.screen(model, batches, num_classes=3, progress=False)) == ["linear1", "linear2"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dataloader": []}, "dataloader is empty"),
        ({"dataloader": [torch.zeros(3, 2, 6, 6)]}, r"tensor \(3, 2, 6, 6\) float32.*labels="),
        ({"exclude": "nothing*"}, r"exclude='nothing\*'.*'conv'"),
        ({"include": "nothing*"}, r"include='nothing\*'.*'conv'"),
        ({"exclude": "*"}, "nothing to screen in Network"),
        ({"model": nn.ReLU()}, "nothing to screen in ReLU"),
        ({"model": nn.Conv2d(2, 2, 1).double(), "num_classes": None}, "num_classes="),
        ({"num_classes": 2}, "0 … 1, found 2"),
        ({"model": nn.Sequential(network(), nn.Identity()), "exclude": "0.bn"}, None),
    ],
)
def test_bad_input_is_an_error_that_says_what_to_do(arguments, said):
    arguments = {"model": network(), "dataloader": loader(), "num_classes": 3, "progress": False} | arguments
    if said is None:
        assert "0.bn" not in fs.screen(**arguments)
        return
    with pytest.raises(ValueError, match=said):
        fs.screen(**arguments)


def test_nan_names_the_layer_and_the_batch():
    batches = [(x.clone(), y) for x, y in loader()]
    batches[2][0][1, 1] = torch.nan
    with pytest.raises(ValueError, match="'conv', first in batch 2 "):
        fs.screen(network(), batches, progress=False)


def test_a_layer_that_never_runs_is_named_with_the_remedy():
    model = network()
    model.unused = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"\['unused'\] never ran.*exclude=\['unused'\]"):
        fs.screen(model, loader(), progress=False)
    assert_screened(fs.screen(model, loader(), exclude="unused", progress=False))


def test_the_progress_bar_is_shown_and_can_be_switched_off(capsys):
    fs.screen(network(), loader(), progress=False)
    silent = capsys.readouterr()
    assert silent.out == silent.err == ""
    fs.screen(network(), loader())
    shown = capsys.readouterr()
    assert "screening" in shown.err
    assert "7/7" in shown.err
    assert shown.out == ""


def test_a_loader_without_a_length_is_consumed_once():
    batches = iter([tuple(batch) for batch in loader()])
    assert_screened(fs.screen(network(), batches, progress=False))
    assert next(batches, None) is None
