"""Handlers of the operators that repeat elements: for every instance, every position, every head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_fscreen.slimming.elementwise import vector
from lightning_fscreen.slimming.interpreter import Handler, Unsupported, Walk, arguments
from lightning_fscreen.slimming.shapes import respect_sizes
from lightning_fscreen.slimming.slots import Value


def expand(walk: Walk, node: Any) -> Value:
    """As `resize`; what is repeated for every head has as many copies as there are heads."""
    value, sizes = vector(walk, node.args[0]), list(node.args[1])
    new = len(sizes) - len(value.shape)
    copied = [dim for dim, size in enumerate(sizes) if size > 1 and (dim < new or value.shape[dim - new] == 1)]
    copies = _copies(walk, node, value, copied)
    result = _broadcast(value, node) if copies is None else copies
    respect_sizes(walk, node, result, sizes, first=0)
    return result


def repeat(walk: Walk, node: Any) -> Value:
    """The whole of every dimension several times; the only element of one as in `expand`."""
    value, times = vector(walk, node.args[0]), list(node.args[1])
    ones = [1] * (len(times) - len(value.shape))
    alone = [dim for dim, size in enumerate((*ones, *value.shape)) if size == 1 and times[dim] > 1]
    copies = _copies(walk, node, value, alone)
    if copies is not None:
        respect_sizes(walk, node, copies, times, first=0)
        return copies

    def tiled(part: Tensor) -> Tensor:
        part = part.reshape(ones + list(part.shape))
        return part.repeat([1 if size == 1 else count for size, count in zip(part.shape, times, strict=True)])

    return Value(tuple(node.meta["val"].shape), *map(tiled, value.fields()))


def repeat_interleave(walk: Walk, node: Any) -> Value:
    """Every element of a dimension several times in a row; the only one of a dimension as in `expand`."""
    value, given = walk.value(node.args[0]), arguments(node)
    dim, times = given["dim"], given["repeats"]
    if not isinstance(times, int) or dim is None:
        raise Unsupported("it repeats elements by different numbers, or of no dimension in particular")
    dim %= len(value.shape)
    copies = _copies(walk, node, value, [dim]) if value.shape[dim] == 1 else None
    if copies is not None:
        respect_sizes(walk, node, copies, [times], first=dim, dim=dim - len(value.shape))
        return copies
    fields = (part if part.shape[dim] == 1 else part.repeat_interleave(times, dim) for part in value.fields())
    return Value(tuple(node.meta["val"].shape), *fields)


def _copies(walk: Walk, node: Any, value: Value, copied: list[int]) -> Value | None:
    """What is repeated for every head, along one of these dimensions; None if it is not, as far as is known."""
    heads = copied[1:] if len(copied) > 1 and copied[0] == 0 else copied  # instances come first
    single = walk.heads.are(value.labels) or not any(size > 1 for size in value.labels.shape[:-1])
    if walk.heads.dims is None and len(heads) == 1 and single:  # what is repeated for positions may be so for heads
        (dim,) = heads
    elif walk.heads.dims and walk.heads.dims.get(node.name) in copied:
        dim = walk.heads.dims[node.name]
        walk.slots.pin(value.labels, "all heads share it")
    else:
        return None
    result = Value.pinned(tuple(node.meta["val"].shape))
    shape = [-1 if place == dim else 1 for place in range(len(result.shape))]
    result.labels = walk.slots.new(result.shape[dim]).reshape(shape)
    walk.heads.note(result.labels)
    return result


def expand_as(walk: Walk, node: Any) -> Value:
    """Broadcast to the shape of another tensor: copies that are made for its channels go with them."""
    value, other = vector(walk, node.args[0]), walk.value(node.args[1])
    result = _broadcast(value, node)
    shape = (1,) * (len(result.shape) - len(value.shape)) + value.shape
    if value.labels.numel() == 1 and all(shape[dim] == 1 for dim, size in enumerate(other.labels.shape) if size > 1):
        walk.slots.pin(value.labels, "it is repeated for other channels")
        result.labels = other.labels
    else:
        walk.slots.unify(result.labels, other.labels)
    return result


def _broadcast(value: Value, node: Any) -> Value:
    shape = tuple(node.meta["val"].shape)
    new = [1] * (len(shape) - len(value.shape))
    return Value(shape, *(part.reshape(new + list(part.shape)) for part in value.fields()))


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("expand", "broadcast_to"), expand),
    "expand_as": expand_as,
    "repeat": repeat,
    "repeat_interleave": repeat_interleave,
}
