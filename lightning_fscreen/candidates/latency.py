"""The latency of a network as a function of its widths: the sum over its operations, each measured by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.experimental.sym_node import SymTypes
from torch.utils import _pytree as pytree

from lightning_fscreen.costs.tables import NO_AXIS, Axis, Costed, TableModel
from lightning_fscreen.costs.timings import Operation, Timings
from lightning_fscreen.modules import join, with_instances
from lightning_fscreen.slimming.capture import Capture, capture
from lightning_fscreen.slimming.interpreter import arguments, is_view, operator_name
from lightning_fscreen.slimming.slots import PINNED
from lightning_fscreen.slimming.widths import Widths

_SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares of a layer's widths at which it is measured."""


def capture_for(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch_size: int) -> Capture:
    """The graph of eval mode with so many instances.

    Raises:
        CaptureError: the network cannot be captured with them.
    """
    device = next(network.parameters()).device
    given, named = with_instances((args, dict(kwargs)), batch_size, device)
    return capture(network, given, named)


def operations_of(captured: Capture) -> Iterator[Operation]:
    """The operations that are timed."""
    return map(_operation, _operations(captured))


def latency_models(
    networks: Mapping[str, tuple[Capture, Widths]], present: float, timings: Timings, round_to: int
) -> dict[str, TableModel]:
    """Nanoseconds of networks for any widths: of all operations, one after the other.

    Linear and ungrouped convolution layers are measured at a grid of widths. Other operations take as much longer than
    the shortest one as they have elements. What a network takes beyond the sum does not depend on widths; if it takes
    less, since operations overlap, all of them count less.

    Args:
        networks: name → graph, and its widths.
        present: nanoseconds of all networks, measured as a whole.
        timings: of operations.
        round_to: number of which widths are left in multiples. Times are those of such multiples that are no higher
            powers of two, since hardware likes these better, and few widths are.
    """
    with timings.together():
        for both in networks.values():
            _latency_model(*both, timings, round_to)
    models = {name: _latency_model(*both, timings, round_to) for name, both in networks.items()}
    counts = {name: widths.count for name, (_, widths) in networks.items()}
    whole = sum(model.of(torch.ones(counts[name], dtype=torch.bool)) for name, model in models.items())
    for model in models.values():
        model.factor = min(1.0, present / max(whole, 1.0))
    return models


def _latency_model(captured: Capture, widths: Widths, timings: Timings, round_to: int) -> TableModel:
    shortest = timings.overhead()
    parts = []
    for node in _operations(captured):
        layer = _layer(node, captured, widths)
        full = timings.of(_operation(node))
        if layer is None:
            labels = widths.calls.get(_largest(node).name, NO_AXIS.classes)
            rows = Axis(labels, (0, len(labels))) if len(labels) else NO_AXIS
            parts.append(_along(rows, [min(shortest, full), full] if len(labels) else [full]))
        else:
            rows, columns = (Axis(own, _points(own, round_to)) for own in (layer.rows, layer.columns))
            times = [[timings.of(layer.narrowed(m, n)) for n in columns.points[1:]] for m in rows.points[1:]]
            costs = _from_zero(torch.tensor(times, dtype=torch.float64), rows.points, shortest)
            parts.append(Costed(rows, columns, 1e6 * _from_zero(costs.T, columns.points, shortest).T))
    for norm, channels in widths.selects.items():
        stream: Any = arguments(captured.users(join(norm, "weight"))[0])["input"]
        if operator_name(stream) == "index_select":  # from an earlier pruning, and counted
            continue
        picked = timings.of(_selection(_value(stream)))  # none is needed while all of them stay
        parts.append(_along(Axis(channels, (0, len(channels) - 1, len(channels))), [min(shortest, picked), picked, 0]))
    return TableModel(parts, widths.count)


def _along(rows: Axis, times: list[float]) -> Costed:
    return Costed(rows, NO_AXIS, 1e6 * torch.tensor(times, dtype=torch.float64)[:, None])


def _selection(stream: Tensor) -> Operation:
    """All channels picked from the input of a batch norm."""
    picked = torch.empty(stream.shape[1], dtype=torch.int64, device="meta")
    return Operation(torch.ops.aten.index_select.default, (stream, 1, picked), {})


class _Layer(NamedTuple):
    """A call that multiplies by a weight of two dimensions that can lose indices.

    Attributes:
        node: the call.
        rows, columns: classes of its outputs and inputs.
        places: tensor that it takes → (dim of the outputs, dim of the inputs); None where it has none.
    """

    node: Any
    rows: Tensor
    columns: Tensor
    places: Mapping[fx.Node, tuple[int | None, int | None]]

    def narrowed(self, rows: int, columns: int) -> Operation:
        """With so many outputs and inputs."""

        def narrow(argument: Any) -> Any:
            if argument not in self.places:
                return _value(argument)
            shape = list(argument.meta["val"].shape)
            for dim, size in zip(self.places[argument], (rows, columns), strict=True):
                if dim is not None:
                    shape[dim] = size
            return torch.empty(shape, dtype=argument.meta["val"].dtype, device="meta")

        return _operation(self.node, narrow)


def _layer(node: Any, captured: Capture, widths: Widths) -> _Layer | None:
    """The layer that a node calls, if its widths are all that changes."""
    name, given = operator_name(node), arguments(node)
    if name == "linear":
        source, weight, bias, channels, transposed = given["input"], given["weight"], given["bias"], -1, False
    elif name.startswith("conv") and "groups" in given and given["groups"] == 1:
        source, weight, bias = given["input"], given["weight"], given["bias"]
        channels, transposed = 1 - len(weight.meta["val"].shape), "transpose" in name
    elif name in ("addmm", "mm"):
        source, weight = given.get("mat1", given["self"]), given["mat2"]
        bias, channels, transposed = given["self"] if name == "addmm" else None, -1, True
    else:
        return None
    places = [(captured.tensors.get(weight.name, ""), dim) for dim in ((1, 0) if transposed else (0, 1))]
    if not all(place in widths.dims for place in places):
        return None
    own = {source: (None, channels), weight: (1, 0) if transposed else (0, 1)}
    own |= {} if bias is None else {bias: (-1, None)}
    return _Layer(node, widths.dims[places[0]], widths.dims[places[1]], own)


def _operations(captured: Capture) -> Iterator[Any]:
    """The calls that compute something: no views, and none whose sizes depend on values."""
    for node in captured.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, OpOverload) or is_view(node):
            continue
        given = [source.meta.get("val") for source in node.all_input_nodes]
        tensors = [value for value in pytree.tree_leaves(given) if isinstance(value, Tensor)]
        if not any(isinstance(size, SymTypes) for tensor in tensors for size in (*tensor.shape, *given)):
            yield node


def _operation(node: Any, value: Any = None) -> Operation:
    args, kwargs = pytree.tree_map_only(fx.Node, value or _value, (node.args, dict(node.kwargs)))
    return Operation(node.target, args, kwargs)


def _value(argument: Any) -> Any:
    return argument.meta.get("val")


def _largest(node: Any) -> Any:
    """Of the activations that a call takes and gives, the one with the most elements."""

    def size(each: Any) -> int:
        value = each.meta.get("val")
        return value.numel() if isinstance(value, Tensor) and each.op != "placeholder" else -1

    return max([node, *node.all_input_nodes], key=size)


def _points(classes: Tensor, round_to: int) -> tuple[int, ...]:
    """0, some widths on the way if it can change, and the whole."""
    size = len(classes)
    shares = _SHARES if bool((classes != PINNED).any()) else ()
    odd = [int(share * size) // round_to for share in shares]
    odd = [number - 1 + number % 2 for number in odd]
    return tuple(sorted({0, *(number * round_to for number in odd if 0 < number * round_to < size), size}))


def _from_zero(times: Tensor, points: tuple[int, ...], shortest: float) -> Tensor:
    """With a first row for no rows at all, to which the next two lead."""
    lowest = times[:1].clamp(max=shortest)
    if len(times) > 1:
        lowest = times[:1] - (times[1:2] - times[:1]) * points[1] / (points[2] - points[1])
    return torch.cat([torch.minimum(lowest.clamp(min=0), times[:1]), times])
