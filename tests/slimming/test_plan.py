from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_fscreen.modules import parameters_by_name
from lightning_fscreen.slimming import PlanError, SlimmingPlan, remove_dead_units
from lightning_fscreen.slimming.carried import attach_plan, plan_of
from lightning_fscreen.slimming.fits import check_fits
from lightning_fscreen.slimming.rewrite import install
from lightning_fscreen.slimming.state import PLAN_KEY
from tests.slimming import zero_columns, zero_rows

names = st.text(min_size=1, max_size=8)
indices = st.sets(st.integers(0, 50), min_size=1, max_size=6).map(lambda found: tuple(sorted(found)))
plans = st.builds(
    SlimmingPlan,
    st.dictionaries(names, st.lists(st.integers(0, 99), max_size=4).map(tuple), max_size=4),
    st.dictionaries(names, st.dictionaries(st.integers(0, 4), indices, max_size=3), max_size=4),
    st.dictionaries(names, st.integers(1, 64), max_size=3),
    st.lists(names, max_size=3).map(tuple),
    st.dictionaries(names, indices, max_size=3),
    st.dictionaries(names, st.text(max_size=20), max_size=3),
)


@given(plans)
def test_json_round_trip(plan: SlimmingPlan) -> None:
    assert SlimmingPlan.from_json(plan.to_json()) == plan


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["format", "shapes", "cuts", "groups", "biases", "selects", "pinned", "0"]),
                inner,
                max_size=6,
            )
        ),
    )
)
def test_other_json_is_no_plan(data: Any) -> None:
    with pytest.raises(PlanError):
        SlimmingPlan.from_json(json.dumps({"format": 1, "shapes": data} if isinstance(data, dict) else data))


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '"plan"', "{}", '{"format": 99}', "[" * 100_000])
def test_other_text_is_no_plan(text: str) -> None:
    with pytest.raises(PlanError, match="plan"):
        SlimmingPlan.from_json(text)


def test_a_plan_of_a_later_format_says_so() -> None:
    data = json.loads(SlimmingPlan().to_json()) | {"format": 2}
    with pytest.raises(PlanError, match="format 2, this version reads 1"):
        SlimmingPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("field", "value", "culprit"),
    [
        ("shapes", {"fc.weight": [4, 2.5]}, "2.5"),
        ("shapes", {"fc.weight": "42"}, "'4'"),
        ("shapes", [], "AttributeError"),
        ("cuts", {"fc.weight": {"0": [0, True]}}, "True"),
        ("cuts", {"fc.weight": {"0": [0, "1"]}}, "'1'"),
        ("cuts", {"fc.weight": {"first": [0]}}, "first"),
        ("cuts", {"fc.weight": [[0]]}, "AttributeError"),
        ("cuts", {"fc.weight": {"0": 3}}, "TypeError"),
        ("groups", {"conv": 1.0}, "1.0"),
        ("groups", {"conv": None}, "None"),
        ("biases", 3, "TypeError"),
        ("selects", {"norm": [0, 1.0]}, "1.0"),
        ("selects", {"norm": 0}, "TypeError"),
        ("selects", {"norm": [True]}, "True"),
        ("selects", [["norm", [0]]], "AttributeError"),
        ("pinned", ["relu"], "AttributeError"),
    ],
)
def test_wrong_types_are_refused_with_the_culprit(field: str, value: Any, culprit: str) -> None:
    data = json.loads(SlimmingPlan().to_json()) | {field: value}
    with pytest.raises(PlanError, match="plan") as caught:
        SlimmingPlan.from_json(json.dumps(data))
    assert culprit in str(caught.value)


# ---- check


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))


def slim(cuts: dict[str, dict[int, tuple[int, ...]]], **fields: Any) -> SlimmingPlan:
    shapes = {"0.weight": (4, 3), "0.bias": (4,), "2.weight": (2, 4)}
    return SlimmingPlan({name: shapes.get(name, (4,)) for name in cuts}, cuts, **fields)


def test_a_plan_that_fits_passes() -> None:
    kept = (0, 3)
    check_fits(slim({"0.weight": {0: kept}, "0.bias": {0: kept}, "2.weight": {1: kept}}, biases=("2",)), mlp())


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ((-1, 2), "-1"),
        ((0, 4), "4"),
        ((1, 1), "repeated"),
        ((2, 0), "ascending"),
        ((), "empty"),
    ],
)
def test_bad_indices_are_refused_by_name(kept: tuple[int, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        check_fits(slim({"0.weight": {0: kept}}), mlp())
    assert "'0.weight'" in str(caught.value)


@pytest.mark.parametrize("dim", [-1, 2])
def test_a_dimension_that_is_not_there_is_refused(dim: int) -> None:
    with pytest.raises(PlanError, match=rf"dimension {dim} of '0.weight'.*\(4, 3\)"):
        check_fits(slim({"0.weight": {dim: (0,)}}), mlp())


def test_check_names_the_first_tensor_that_differs() -> None:
    with pytest.raises(PlanError, match=r"'1.weight', which Sequential does not have"):
        check_fits(slim({"0.weight": {0: (0,)}, "1.weight": {0: (0,)}, "9.weight": {0: (0,)}}), mlp())
    wide = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(PlanError, match=r"'2.weight' of shape \(2, 4\), this model's has shape \(2, 5\)"):
        check_fits(slim({"0.weight": {0: (0,)}, "2.weight": {1: (0,)}}), wide)


def test_a_cut_without_a_shape_is_refused() -> None:
    with pytest.raises(PlanError, match=r"0\.weight"):
        check_fits(SlimmingPlan({}, {"0.weight": {0: (0,)}}), mlp())


@pytest.mark.parametrize("name", ["0", "1", "7"])
def test_a_bias_that_cannot_be_added_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match=f"'{name}'"):
        check_fits(SlimmingPlan(biases=(name,)), mlp())


def test_a_bias_for_something_without_a_weight_is_refused() -> None:
    network = nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2, affine=False))
    with pytest.raises(PlanError, match="'1'"):
        check_fits(SlimmingPlan(biases=("1",)), network)


@pytest.mark.parametrize("groups", [-1, 0, 3, 6])
def test_groups_that_do_not_fit_their_layer_are_refused(groups: int) -> None:
    network = nn.Sequential(nn.Conv1d(6, 6, 1, groups=6))
    kept = (0, 2, 4, 5)
    plan = SlimmingPlan({"0.weight": (6, 1, 1), "0.bias": (6,)}, {"0.weight": {0: kept}, "0.bias": {0: kept}})
    check_fits(SlimmingPlan(plan.shapes, plan.cuts, {"0": 4}), network)
    with pytest.raises(PlanError, match="'0'"):
        check_fits(SlimmingPlan(plan.shapes, plan.cuts, {"0": groups}), network)


def test_groups_of_something_that_is_no_convolution_are_refused() -> None:
    with pytest.raises(PlanError, match="'0'"):
        check_fits(SlimmingPlan(groups={"0": 2}), mlp())


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(2, 6, 1), nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False))


NORM_SHAPES = {"1.weight": (6,), "2.running_mean": (6,)}


@pytest.mark.parametrize(("name", "tensor"), [("1", "1.weight"), ("2", "2.running_mean")])
def test_a_select_of_the_right_length_fits(name: str, tensor: str) -> None:
    check_fits(SlimmingPlan(selects={name: tuple(range(6))}, removed={name: 1}), normed())
    plan = SlimmingPlan({tensor: (6,)}, {tensor: {0: (0, 4)}}, selects={name: (1, 2)}, removed={name: 4})
    check_fits(plan, normed())  # of a version that did not record the streams
    check_fits(replace(plan, streams={name: (0, 2, 4)}, selects={name: (0, 2)}), normed())


@pytest.mark.parametrize("name", ["1", "2"])
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ((1, 6), "index 6"),
        ((-1, 3), "index -1"),
        ((3, 1), "ascending"),
        ((), "empty"),
        ((1, 2, 3), "3 channels for batch norm '[12]', which has 2"),
        ((1,), "1 channels for batch norm '[12]', which has 2"),
    ],
)
def test_bad_selects_are_refused_by_name(name: str, indices: tuple[int, ...], message: str) -> None:
    cuts = {tensor: {0: (0, 4)} for tensor in NORM_SHAPES}
    with pytest.raises(PlanError, match=message) as caught:
        check_fits(SlimmingPlan(NORM_SHAPES, cuts, selects={name: indices}), normed())
    assert f"'{name}" in str(caught.value)


def test_what_a_plan_says_twice_must_agree() -> None:
    cuts = {"1.weight": {0: (0, 4)}}
    plan = SlimmingPlan({"1.weight": (6,)}, cuts, selects={"1": (0, 2)}, removed={"1": 4}, streams={"1": (0, 2, 4)})
    check_fits(plan, normed())
    changes: list[dict[str, Any]] = [
        {"selects": {"1": (0, 1)}},
        {"selects": {"1": (0, 3)}},
        {"streams": {"1": (0, 4)}},
        {"streams": {"1": (0, 2, 9)}},
        {"cuts": {"1.weight": {0: (0, 3)}}},
        {"selects": {}},
        {"selects": {}, "streams": {}},
        {"removed": {}, "streams": {}},
        {"removed": {"1": 4, "7": 1}},
        {"shapes": {"1.weight": (6,), "2.running_mean": (6,)}},
    ]
    for change in changes:
        with pytest.raises(PlanError):
            check_fits(replace(plan, **change), normed())


@pytest.mark.parametrize("name", ["0", "3", "1.weight"])
def test_a_select_for_something_that_is_no_batch_norm_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match=f"batch norm '{name}', which Sequential does not have"):
        check_fits(SlimmingPlan(selects={name: (0,)}), normed())


def test_a_select_for_a_batch_norm_without_tensors_is_refused() -> None:
    network = nn.Sequential(nn.BatchNorm1d(6, affine=False, track_running_stats=False))
    with pytest.raises(PlanError, match="'0"):
        check_fits(SlimmingPlan(selects={"0": (0,)}), network)


# ---- composition


def twice() -> tuple[nn.Sequential, nn.Sequential, SlimmingPlan, SlimmingPlan]:
    """A full network, the same one slimmed twice, and both plans."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten(),
        nn.Linear(24, 9), nn.Sigmoid(), nn.Linear(9, 3, bias=False),
    )  # fmt: skip
    full = copy.deepcopy(network)
    zero_columns(network[4], 1, 5, 6)
    zero_rows(network[6], 0, 1)
    example = torch.randn(2, 2, 4, 4)
    first = remove_dead_units(network, (example,))
    zero_columns(network[4], 0, 2)
    zero_columns(network[8], 3)
    return full, network, first, remove_dead_units(network, (example,))


def test_two_plans_in_one_do_what_they_do_in_turn() -> None:
    full, network, first, second = twice()
    assert first.biases == ("8",) and first and second
    total = first.then(second)
    assert plan_of(network) == total
    check_fits(total, full)
    state = network.state_dict()
    install(full, total, state)
    assert {name: tuple(tensor.shape) for name, tensor in full.state_dict().items()} == {
        name: tuple(tensor.shape) for name, tensor in state.items() if name != PLAN_KEY
    }
    x = torch.randn(3, 2, 4, 4)
    assert torch.equal(full(x), network(x))
    assert total.removed == {"0": 5, "2": 5, "6": 3}


@given(st.integers(0, 2**31))
def test_then_composes_indices(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(7, 5, generator=generator)

    def random_cut(shape: tuple[int, ...]) -> SlimmingPlan:
        dims = {}
        for dim, size in enumerate(shape):
            kept = (torch.rand(size, generator=generator) < 0.7).nonzero().flatten().tolist()
            if torch.rand(1, generator=generator) < 0.7 and kept:
                dims[dim] = tuple(kept)
        return SlimmingPlan({"w": shape}, {"w": dims}) if dims else SlimmingPlan()

    first = random_cut((7, 5))
    once = first.cut("w", tensor)
    second = random_cut(tuple(once.shape))
    assert torch.equal(first.then(second).cut("w", tensor), second.cut("w", once))
    assert first.then(second).shapes.get("w", (7, 5)) == (7, 5)


def test_a_bias_added_first_and_cut_later_fits_a_fresh_model() -> None:
    """The second slimming removes units of the layer that got a bias in the first."""
    network = nn.Sequential(nn.Linear(3, 6), nn.Sigmoid(), nn.Linear(6, 5, bias=False), nn.Sigmoid(), nn.Linear(5, 2))
    fresh = copy.deepcopy(network)
    zero_rows(network[0], 0, 1)
    assert remove_dead_units(network, (torch.randn(2, 3),)).biases == ("2",)
    zero_columns(network[4], 2)
    remove_dead_units(network, (torch.randn(2, 3),))
    assert network[2].bias.shape == (4,)
    plan = plan_of(network)
    check_fits(plan, fresh)
    install(fresh, plan, network.state_dict())
    x = torch.randn(4, 3)
    assert torch.equal(fresh(x), network(x))


@given(plans, plans, names)
def test_under_prefixes_every_name(first: SlimmingPlan, second: SlimmingPlan, prefix: str) -> None:
    moved = first.under(prefix)
    for field in ("shapes", "cuts", "groups", "selects", "streams"):
        old, new = getattr(first, field), getattr(moved, field)
        assert new == {f"{prefix}.{name}": value for name, value in old.items()}
    assert moved.biases == tuple(f"{prefix}.{name}" for name in first.biases)
    assert first.under("") == first
    assert first.under("b").under("a") == first.under("a.b")


def test_a_later_select_replaces_an_earlier_one() -> None:
    first = SlimmingPlan(selects={"1": (0, 2), "4": (1,)})
    total = first.then(SlimmingPlan(selects={"1": (1,)}))
    assert total.selects == {"1": (1,), "4": (1,)}


def test_a_plan_is_true_if_it_changes_something() -> None:
    assert not SlimmingPlan() and not SlimmingPlan(pinned={"gru": "unknown"})
    assert slim({"0.weight": {0: (0,)}}) and SlimmingPlan(biases=("2",)) and SlimmingPlan(selects={"1": (0,)})


def test_removed_counts_the_output_channels_of_transposed_convolutions() -> None:
    network = nn.Sequential(nn.Conv2d(2, 5, 1), nn.ReLU(), nn.ConvTranspose2d(5, 7, 2), nn.ReLU(), nn.Conv2d(7, 2, 1))
    zero_columns(network[4], 0, 1, 2)
    plan = remove_dead_units(network, (torch.randn(2, 2, 4, 4),))
    assert network[2].out_channels == 4
    assert plan.removed == {"2": 3}


# ---- plans on networks


def test_a_plan_follows_copies_and_is_found_under_its_name() -> None:
    model = nn.Module()
    model.net = mlp()
    plan = slim({"0.weight": {0: (0, 1)}})
    assert not plan_of(model)
    attach_plan(model.net, plan)
    assert plan_of(copy.deepcopy(model)) == plan.under("net")
    assert plan_of(model.net) == plan
    assert "plan" not in " ".join(model.state_dict())


@pytest.mark.parametrize("order", [("net", ""), ("", "net")])
def test_plans_of_a_part_and_of_the_whole_are_joined_in_the_order_they_were_made(order: tuple[str, str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    fresh = copy.deepcopy(model)
    for name, unit in zip(order, (0, 1), strict=True):
        zero_columns(model.net[2], unit)
        remove_dead_units(model.get_submodule(name), (torch.randn(2, 3),))
    assert model.net[0].out_features == 4
    plan = plan_of(model)
    check_fits(plan, fresh)
    before = {name: plan.cut(name, tensor) for name, tensor in fresh.state_dict().items()}
    assert torch.equal(before["net.0.weight"], model.net[0].weight)


def test_parameters_by_name_lists_every_place() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    network[1].weight = network[0].weight
    places = parameters_by_name(network)
    assert places["0.weight"] == [(network[0], "weight"), (network[1], "weight")]
    assert places["2.running_var"] == [(network[2], "running_var")]
    assert "1.weight" not in places and "1.bias" in places


def test_it_prints_as_a_table_of_what_stays() -> None:
    plan = SlimmingPlan(
        shapes={"stem.weight": (4, 3, 3, 3), "norm.weight": (4,), "head.weight": (5, 4), "up.weight": (4, 2, 1, 1)},
        cuts={
            "stem.weight": {0: (0, 2)},
            "norm.weight": {0: (0, 2)},
            "head.weight": {1: (0, 2)},
            "up.weight": {0: (1,)},
        },
        groups={"depth": 2},
        biases=("head",),
        selects={"norm": (0, 2)},
        pinned={"aten.sort": "it <sorts>", "aten.topk": "it <sorts>"},
        removed={"stem": 2},
    )
    assert [line.split() for line in str(plan).splitlines()] == [
        "2 units and channels removed from 1 layer".split(),
        [],
        "layer units kept values".split(),
        ["─" * width for width in (5, 5, 7, 8, 24)],
        "stem 4 → 2 50.00 % 108 → 54 weight 4×3×3×3 → 2×3×3×3".split(),
        "norm 4 → 2 50.00 % 4 → 2 weight 4 → 2".split(),
        "head – – 20 → 10 weight 5×4 → 5×2".split(),
        "up – – 8 → 2 weight 4×2×1×1 → 1×2×1×1".split(),
        *([], "batch norms that select from the channels of their input:".split(), "norm reads 2 channels".split()),
        *([], "convolutions with fewer groups:".split(), "2 left: depth".split()),
        *([], "layers that got a bias, for the constant outputs of what was removed:".split(), ["head"]),
        *([], "operators that kept their channels:".split(), "it <sorts>: aten.sort, aten.topk".split()),
    ]
    assert "it &lt;sorts&gt;" in plan._repr_html_() and str(SlimmingPlan()) == "nothing was removed"
    assert repr(plan) == "<SlimmingPlan: 2 units and channels removed from 1 layer>"
