"""Operators say how channels pass through them: what they cannot follow stays whole, and errors are not hidden."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fscreen.slimming import (
    Unsupported,
    Value,
    VerificationError,
    pointwise,
    register_operator,
    remove_dead_units,
    slim,
)
from lightning_fscreen.slimming.operators import HANDLERS
from tests.slimming import difference, outputs, snapshot, untouched, zero_rows
from tests.slimming.masked import find_gates

X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).double()
KEEP = torch.tensor([True, False, True, True, False, True, True, True])


@torch.library.custom_op("fscreen_tests::quartic", mutates_args=())
def quartic(x: Tensor) -> Tensor:
    return x**4 + 0.5


@torch.library.custom_op("fscreen_tests::reverse_channels", mutates_args=())
def reverse_channels(x: Tensor) -> Tensor:
    return x.flip(1)


@torch.library.custom_op("fscreen_tests::overwrite", mutates_args=("x",))
def overwrite(x: Tensor) -> None:
    x.fill_(0.3)


quartic.register_fake(torch.empty_like)
reverse_channels.register_fake(torch.empty_like)
overwrite.register_fake(lambda x: None)


@pytest.fixture
def handlers() -> Iterator[None]:
    """What is registered is forgotten again."""
    before = dict(HANDLERS)
    yield
    HANDLERS.clear()
    HANDLERS.update(before)


class Network(nn.Module):
    """A function between a batch norm and the convolution that reads it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        self.function = function
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.function(self.norm(self.first(x))))
        return y


def slimmed(network: Network, bias: Any = "zero") -> tuple[Network, float]:
    """The network without the channels that are not in `KEEP`, and how its outputs differ from the masked network's."""
    masked = copy.deepcopy(network)
    with torch.no_grad():
        masked.norm.weight[~KEEP] = 0
        if bias == "zero":
            masked.norm.bias[~KEEP] = 0
    slim(network, {"norm": KEEP}, X, bias)
    return network, difference(outputs(masked, X), outputs(network, X))


# ---- one error pins, all others are raised


@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError, IndexError, RuntimeError, AssertionError])
def test_an_error_in_a_handler_is_raised(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def broken(walk: Any, node: Any) -> Any:
        raise error("on purpose")

    monkeypatch.setitem(HANDLERS, "linear", broken)
    network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    zero_rows(network[0], 2)
    before = snapshot(network)
    with pytest.raises(error, match="on purpose"):
        remove_dead_units(network, (torch.randn(4, 3),))
    assert untouched(network, before)
    network = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    before = snapshot(network)
    with pytest.raises(error, match="on purpose"):
        slim(network, {"1": KEEP}, torch.randn(4, 3))
    assert untouched(network, before)
    with pytest.raises(error, match="on purpose"):
        find_gates(network, torch.randn(4, 3))


def test_a_handler_that_cannot_tell_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(walk: Any, node: Any) -> Any:
        raise Unsupported("it is Tuesday")

    monkeypatch.setitem(HANDLERS, "relu", unable)
    network = Network(F.relu)
    assert [gate.excluded for gate in find_gates(network, X)] == ["operation 'relu': it is Tuesday"]
    plan = slim(network, {"norm": KEEP}, X)
    assert network.norm.num_features == 8 and list(plan.pinned.values()) == ["operation 'relu': it is Tuesday"]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.view(torch.int64).view(torch.float64), "another dtype"),
        (lambda x: x + x.sum(), "it mixes channels"),
        (lambda x: x * x.max(), "it mixes channels"),
        (lambda x: x.roll(1, 1), "it moves channels to other places"),
        (lambda x: F.pad(x, [0, 0, 0, 0, 1, -1]), "it adds channels"),
        (lambda x: x * x.mean().item(), "computed from values"),
        (lambda x: x.index_select(1, torch.arange(8)), "not known to keep channels apart"),
        (lambda x: x[x[:, 0, 0, 0] > -1e9].narrow(0, 0, 4), "not known to keep channels apart"),
        (lambda x: F.batch_norm(x, torch.zeros(8).double(), torch.ones(8).double()), "is no parameter or buffer"),
        (lambda x: F.conv2d(x, torch.ones(8, 8, 1, 1).double()), "its weight is no parameter"),
        (lambda x: F.prelu(x, torch.ones(8).double()), "its slope is no parameter"),
    ],
)
def test_reasons_of_operators_that_keep_all_channels(function: Callable[[Tensor], Tensor], reason: str) -> None:
    network = Network(function)
    assert find_gates(network, X)[0].excluded is not None
    plan = slim(copy.deepcopy(network), {"norm": KEEP}, X)
    assert any(reason in text for text in plan.pinned.values())
    network, error = slimmed(network)
    assert network.norm.num_features == 8 and error < 1e-9


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mT.multiply(2).sin(),
        lambda x: x.roll(1, -1) + x.flip(2),
        lambda x: x.repeat(1, 1, 2, 1),
        lambda x: x.max(2, keepdim=True).values + x.min(-1, True)[0],
        lambda x: torch.max(x, x * 2) * x.new_ones(1),
    ],
)
def test_units_go_through_operators_on_positions(function: Callable[[Tensor], Tensor]) -> None:
    network, error = slimmed(Network(function))
    assert network.first.out_channels == network.last.in_channels == 6 and error < 1e-9


def test_a_linear_function_of_a_vector_keeps_all_units() -> None:
    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
            self.vector = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.first(x))
            return self.last(h + F.linear(h, self.vector)[:, None])

    x = torch.randn(4, 3)
    network = Vector()
    assert find_gates(network, x)[0].excluded == "operation 'linear': its weight is no matrix"
    slim(network, {"norm": KEEP}, x)
    assert network.norm.num_features == network.last.in_features == len(network.vector) == 8


def test_one_bias_for_all_units_stays_whole() -> None:
    network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    network[2].bias = nn.Parameter(torch.ones(1).double())
    zero_rows(network[0], 1, 4)
    zero_rows(network[2], 0)
    with torch.no_grad():
        network[0].bias[1], network[0].bias[4] = -1, 1  # nothing after ReLU, and a constant that no bias can take
    x = torch.randn(4, 3).double()
    before = outputs(network, x)
    plan = remove_dead_units(network, (x,))
    assert difference(before, outputs(network, x)) < 1e-9
    assert network[2].bias.shape == (1,) and network[2].out_features == 3 and plan.removed == {"0": 1}


# ---- what an operator writes to


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mul(0).add_(0.5).relu_(),
        lambda x: torch.mul(x, 0.5, out=torch.empty_like(x)),
        lambda x: (y := torch.empty_like(x), torch.add(x, x, out=y), y)[2],
        lambda x: (x.masked_fill_(x > 1, 0.5), x)[1],
        lambda x: (x.mul_(0), x.fill_(0.5), x)[2],
        lambda x: (torch._foreach_mul_([x], 2.0), x)[1],
        lambda x: (overwrite(x), x)[1],
    ],
    ids=["add_", "out", "out_read_later", "masked_fill_", "fill_", "foreach_", "custom"],
)
@pytest.mark.parametrize("bias", ["zero", "fold"])
def test_readers_of_an_argument_that_was_written_see_the_result(
    function: Callable[[Tensor], Tensor], bias: str
) -> None:
    _, error = slimmed(Network(function), bias)
    assert error < 1e-9


def test_an_argument_that_is_written_but_not_returned_stays_whole(handlers: None) -> None:
    register_operator("fscreen_tests::overwrite")(lambda walk, node: None)
    network = Network(lambda x: (overwrite(x), x)[1])
    assert "writes to an argument that it does not return" in str(find_gates(network, X)[0].excluded)
    network, error = slimmed(network)
    assert network.norm.num_features == 8 and error < 1e-9


def test_a_constant_may_be_larger_after_an_operator_in_place() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 8, bias=False), nn.Linear(8, 2)
            self.shift = nn.Parameter(torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).add_(self.shift))

    network, x = Adds().double(), torch.randn(4, 3).double()
    zero_rows(network.first, *range(8))
    before = outputs(network, x)
    plan = remove_dead_units(network, (x,))
    assert plan.removed == {"first": 7} and difference(before, outputs(network, x)) < 1e-9


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64])
def test_constants_are_rounded_with_a_cast(dtype: torch.dtype) -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).to(dtype).type_as(self.last.bias))

    network, x = Casts().double(), 3 * torch.randn(4, 3).double()
    zero_rows(network.first, 1, 5)
    before = outputs(network, x)
    plan = remove_dead_units(network, (x,))
    assert plan.removed["first"] >= 2 and difference(before, outputs(network, x)) < 1e-9


@pytest.mark.parametrize("function", [lambda x: x * ((x.int() & 1) + 1), lambda x: x * (x.long() ^ 3)])
def test_constants_of_operators_for_whole_numbers(function: Callable[[Tensor], Tensor]) -> None:
    network, error = slimmed(Network(function), "fold")
    assert network.first.out_channels == 6 and error < 1e-9


# ---- operators from outside


@pytest.mark.parametrize("bias", ["zero", "fold"])
def test_a_registered_operator_is_slimmed_exactly(handlers: None, bias: str) -> None:
    assert find_gates(Network(lambda x: quartic(x)), X)[0].excluded == (
        "operation 'fscreen_tests::quartic': not known to keep channels apart"
    )
    register_operator("fscreen_tests::quartic")(pointwise)
    assert find_gates(Network(lambda x: quartic(x)), X)[0].excluded is None
    network, error = slimmed(Network(lambda x: quartic(x)), bias)
    assert network.first.out_channels == network.norm.num_features == network.last.in_channels == 6
    assert error < 1e-9


def test_a_handler_of_ones_own_moves_the_labels(handlers: None) -> None:
    @register_operator("fscreen_tests::reverse_channels")
    def follow(walk: Any, node: Any) -> Value:
        value = walk.value(node.args[0])
        return Value(value.shape, *(part.flip(1) for part in value.fields()))

    network, error = slimmed(Network(lambda x: reverse_channels(x)))
    assert network.first.out_channels == 6 and error < 1e-9
    mixed = Network(lambda x: x + reverse_channels(x))  # channel 2 goes with 5, 4 with 3: both of a pair have to
    network, error = slimmed(mixed)
    assert network.norm.num_features == 8 and error < 1e-9


def test_a_wrong_handler_is_found_out(handlers: None) -> None:
    register_operator("fscreen_tests::reverse_channels")(pointwise)
    network = Network(lambda x: reverse_channels(x))
    with torch.no_grad():
        network.norm.bias.normal_()
    before = snapshot(network)
    with pytest.raises(VerificationError):
        slim(network, {"norm": KEEP}, X)
    assert untouched(network, before)


def test_a_handler_that_returns_no_value_is_an_error(handlers: None) -> None:
    register_operator("fscreen_tests::quartic")(lambda walk, node: None)
    with pytest.raises(TypeError, match="'fscreen_tests::quartic' returned None, which is no Value"):
        find_gates(Network(lambda x: quartic(x)), X)


def test_operators_of_torch_can_be_added(handlers: None) -> None:
    assert "'sinc'" in str(find_gates(Network(torch.sinc), X)[0].excluded)
    register_operator("aten::sinc")(pointwise)
    network, error = slimmed(Network(torch.sinc))
    assert network.first.out_channels == 6 and error < 1e-9


@pytest.mark.parametrize("name", ["sin", "::sin", ""])
def test_a_name_without_a_namespace_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"namespace.*'mine::gate'.*{name!r}"):
        register_operator(name)


def test_an_operator_has_one_handler(handlers: None) -> None:
    with pytest.raises(ValueError, match="'aten::relu' has a handler already"):
        register_operator("aten::relu")(pointwise)
    register_operator("fscreen_tests::quartic")(pointwise)
    with pytest.raises(ValueError, match="'fscreen_tests::quartic' has a handler already"):
        register_operator("fscreen_tests::quartic")(pointwise)
