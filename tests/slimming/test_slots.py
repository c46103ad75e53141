from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_fscreen.slimming.capture import capture
from lightning_fscreen.slimming.interpreter import Walk, operator_name
from lightning_fscreen.slimming.operators import HANDLERS
from lightning_fscreen.slimming.slots import PINNED, SlotGraph, Value, compress

COUNT = 12
pairs = st.lists(st.tuples(st.integers(0, COUNT), st.integers(0, COUNT)), max_size=20)


def smallest_reachable(edges: list[tuple[int, int]]) -> list[int]:
    """The smallest label of each label's class, by walking from every label."""
    result = []
    for start in range(COUNT + 1):
        seen, todo = {start}, [start]
        while todo:
            label = todo.pop()
            for a, b in edges:
                for near, far in ((a, b), (b, a)):
                    if near == label and far not in seen:
                        seen.add(far)
                        todo.append(far)
        result.append(min(seen))
    return result


@given(pairs)
def test_components_are_the_connected_classes(edges: list[tuple[int, int]]) -> None:
    graph = SlotGraph()
    graph.new(COUNT)
    for a, b in edges:
        graph.unify(torch.tensor([a]), torch.tensor([b]))
    assert graph.components().tolist() == smallest_reachable(edges)


@given(st.permutations(range(1, COUNT + 1)))
def test_a_long_chain_in_any_order_is_one_class(order: list[int]) -> None:
    graph = SlotGraph()
    graph.new(COUNT)
    graph.unify(torch.tensor(order[:-1]), torch.tensor(order[1:]))
    assert graph.components().tolist() == [PINNED, *[1] * COUNT]


def test_unify_broadcasts_and_pin_joins_the_slot_that_stays() -> None:
    graph = SlotGraph()
    first, second = graph.new(2), graph.new(3)
    assert first.tolist() == [1, 2] and second.tolist() == [3, 4, 5]
    graph.unify(first[:1], second)
    graph.pin(first[1:], "a reason")
    assert graph.components().tolist() == [PINNED, 1, PINNED, 1, 1, 1]


def test_classes_of_slots_that_stay_can_be_told_apart() -> None:
    graph = SlotGraph()
    first, second = graph.new(2), graph.new(2)
    graph.unify(first, second)
    graph.pin(first[:1], "a reason")
    assert graph.components().tolist() == [PINNED, PINNED, 2, PINNED, 2]
    assert graph.components(pinned=False).tolist() == [PINNED, 1, 2, 1, 2]


def test_every_pin_keeps_its_reason() -> None:
    graph = SlotGraph()
    labels = graph.new(3)
    graph.pin(labels[[0, 2, 2]], "a reason")
    graph.pin(torch.tensor([PINNED]), "nothing new")
    graph.unify(labels[1:2], torch.tensor([PINNED]))
    assert [(pinned.tolist(), reason) for pinned, reason in graph.pins] == [
        ([1, 3], "a reason"),
        ([2], "it is added to, or multiplied by, a tensor whose channels all stay"),
    ]
    assert graph.components().tolist() == [PINNED] * 4
    assert graph.components(pinned=False).tolist() == [PINNED, 1, 2, 3]


def test_cutting_a_dimension_twice_makes_its_slots_the_same() -> None:
    graph = SlotGraph()
    first, second = graph.new(2), graph.new(2)
    graph.cut("fc.weight", 0, first)
    graph.cut("fc.weight", 0, second)
    graph.cut("fc.weight", 1, graph.new(2))
    assert graph.components().tolist() == [PINNED, 1, 2, 1, 2, 5, 6]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Small integers, some dimensions of which are repeated."""
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    repeated = [draw(st.booleans()) for _ in shape]
    base = [1 if again else size for size, again in zip(shape, repeated, strict=True)]
    count = torch.Size(base).numel()
    values = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    return torch.tensor(values).reshape(base).expand(shape)


@given(tensors())
def test_compress_loses_nothing_and_leaves_nothing_to_narrow(tensor: Tensor) -> None:
    small = compress(tensor)
    assert torch.equal(small.expand(tensor.shape), tensor)
    for dim, size in enumerate(small.shape):
        assert size == 1 or bool((small.unique(dim=dim).shape[dim]) > 1)


@given(tensors(), st.data())
def test_along_reads_one_dimension_and_pins_what_the_others_run_over(labels: Tensor, data: st.DataObject) -> None:
    dim = data.draw(st.integers(-labels.ndim, labels.ndim - 1))
    labels = labels + 1
    constant = torch.randint(0, 2, labels.shape, generator=torch.Generator().manual_seed(0)).double()
    known = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.8
    graph = SlotGraph()
    graph.new(2)
    got, got_constant, got_known = graph.along(
        Value(tuple(labels.shape), compress(labels), compress(constant), compress(known)), dim
    )
    assert got.shape == got_constant.shape == got_known.shape == (labels.shape[dim],)
    varies = any(size > 1 for i, size in enumerate(compress(labels).shape) if i != dim % labels.ndim)
    pinned = set(labels.unique().tolist()) if varies else set()
    assert {label for label in (1, 2) if graph.components()[label] == PINNED} == pinned
    for index in range(labels.shape[dim]):
        values, flags = constant.select(dim, index), known.select(dim, index)
        assert bool(got_known[index]) == bool(flags.all() and (values == values.flatten()[0]).all())
        if got_known[index]:
            assert got_constant[index] == values.flatten()[0]
        if not varies:
            assert (labels.select(dim, index) == got[index]).all()


def test_a_pinned_value_is_of_one_slot_and_of_unknown_value() -> None:
    value = Value.pinned((2, 3, 4))
    labels, constant, known = value.parts()
    assert labels.shape == constant.shape == known.shape == (2, 3, 4)
    assert labels.unique().tolist() == [PINNED] and not known.any()


class Tokens(nn.Module):
    """A class token that is put in front, and residual linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.layers = nn.Parameter(torch.zeros(1, 1, 6)), nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.layers[0](x)], 1)
        x = x + self.layers[1](x)
        return x + self.layers[2](x)


def test_labels_are_no_larger_than_what_varies() -> None:
    network = Tokens()
    captured = capture(network, (torch.randn(2, 4, 6),))
    walk = Walk(network, captured, HANDLERS, {})
    walk.run()
    sums = [value for node, value in walk.values.items() if operator_name(node) == "add"]
    assert [tuple(value.labels.shape) for value in sums] == [(1, 1, 6), (1, 1, 6)]
