"""What slimming will leave for some masks, against what it does leave."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_fscreen.modules import named_tensors
from lightning_fscreen.slimming.gates import capture_training
from lightning_fscreen.slimming.kinds import off, switch_of
from lightning_fscreen.slimming.operators import find_slots
from lightning_fscreen.slimming.planning import make_change
from lightning_fscreen.slimming.positions import positions
from lightning_fscreen.slimming.slim import slim_captured
from lightning_fscreen.slimming.widths import Widths
from tests.slimming.masked import CASES, Case, cases, dags, masked_copy


def left(widths: Widths, network: nn.Module, keep: dict[str, Tensor]) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes of all parameters, as foretold, and how many bias values will be new."""
    kept, biases = widths.remaining(keep)
    shapes = {name: list(tensor.shape) for name, tensor in network.named_parameters()}
    for (name, dim), classes in widths.dims.items():
        if name in shapes:
            shapes[name][dim] = int(kept[classes].sum())
    return {name: tuple(shape) for name, shape in shapes.items()}, biases


@settings(max_examples=max(CASES // 2, 1), deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(st.one_of(cases(), dags()), st.sampled_from([1, 1, 2, 3]))
def test_shapes_are_those_after_slimming(case: Case, round_to: int) -> None:
    network = case.network
    assume(case.keep)
    captured = capture_training(network, (case.example,), {})
    gates = {name: len(mask) for name, mask in case.keep.items()}
    widths = Widths(network, captured, gates, case.bias == "zero", round_to)
    classes, kept = (torch.cat(list(each.values())) for each in (widths.units, case.keep))
    assume(not set(classes[kept].tolist()) & set(classes[~kept].tolist()))  # whole units
    shapes, biases = left(widths, network, case.keep)
    masked = masked_copy(network, case.keep, case.bias)
    switched = {name: off(*switch_of(masked, name, {}), ~mask) for name, mask in case.keep.items()}
    first = make_change(masked, find_slots(masked, captured, switched), switched, round_to=round_to).plan
    plan = slim_captured(
        network,
        captured,
        case.keep,
        (case.example,),
        {},
        case.bias,  # type: ignore[arg-type]
        round_to=round_to,
    )
    assume(plan.is_like(first))  # else sizes are written into forward, which only verification finds out
    parameters = dict(network.named_parameters())
    added = {f"{name}.bias" for name in plan.biases}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in parameters.items() if name not in added}
    assert biases == sum(parameters[name].numel() for name in added)


def test_a_stream_is_held_by_the_batch_norms_that_read_it() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(6, 2, 1)
            self.norm1, self.grow, self.norm2 = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.last(self.norm2(torch.cat([x, self.grow(self.norm1(x))], 1)))

    network = Dense()
    widths = Widths(network, capture_training(network, (torch.randn(2, 3, 4, 4),), {}), {"norm1": 4, "norm2": 6}, True)
    held = [tuple(pair) for pair in widths.held.tolist()]
    stem, grow = widths.dims["stem.weight", 0].tolist(), widths.dims["grow.weight", 0].tolist()
    norm1, norm2 = widths.units["norm1"].tolist(), widths.units["norm2"].tolist()
    assert sorted(held) == sorted([*zip(stem, norm1, strict=True), *zip(stem + grow, norm2, strict=True)])


class Calls(nn.Module):
    """Every kind of product with a weight, one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.strided = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, groups=2)
        self.up, self.twice = nn.ConvTranspose2d(4, 6, 2, stride=2), nn.Linear(6, 6)
        self.matrix, self.added = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5, 7))
        self.bias = nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.strided(self.conv(x))).movedim(1, -1)
        x = self.twice(self.twice(x).relu()) @ self.matrix
        return torch.addmm(self.bias, x.flatten(0, -2), self.added)


@pytest.mark.parametrize("batch", [1, 3])
def test_positions_are_those_that_the_flop_counter_of_torch_sees(batch: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    network = Calls()
    x = torch.randn(batch, 3, 9, 9)
    found = positions(capture_training(network, (x,), {}))
    counter = FlopCounterMode(display=False)
    with counter:
        network(x)
    numel = {name: tensor.numel() for name, tensor in named_tensors(network).items()}
    assert sum(count * numel[name] for name, count in found.items()) == counter.get_total_flops() // 2
    assert found["twice.weight"] == 2 * batch * 8 * 8 and found["added"] == found["matrix"] == batch * 8 * 8
    assert "conv.weight" not in positions(capture_training(copy.deepcopy(network), (x,), {}), idle=["conv"])
