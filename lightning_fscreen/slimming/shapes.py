"""Handlers of the operators that rearrange elements: reshaping, splitting, joining, padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fscreen.slimming.interpreter import Handler, Unsupported, Walk, arguments, operator_name
from lightning_fscreen.slimming.slots import Value, compress


def move(walk: Walk, node: Any) -> Value:
    """Operators that only rearrange elements are run on the labels themselves."""
    value = walk.value(node.args[0])
    given = arguments(node)
    if "dtype" in given:  # view(dtype) cuts elements into pieces
        raise Unsupported("it reads its input as another dtype")
    shape = tuple(node.meta["val"].shape)
    if not bool(value.labels.any()) and not bool(value.known.any()):
        return Value.pinned(shape)
    moved = [compress(node.target(part.contiguous(), *node.args[1:], **node.kwargs)) for part in value.parts()]
    return Value(shape, *moved)


def squeeze(walk: Walk, node: Any) -> Value:
    """As `move`; a dimension that shrinks to 1 would go."""
    value, result = walk.value(node.args[0]), move(walk, node)
    dims = node.args[1] if len(node.args) > 1 else range(len(value.shape))
    for dim in dims if isinstance(dims, list | tuple | range) else [dims]:
        if value.labels.ndim and value.labels.shape[dim] > 1:
            walk.slots.pin(value.labels, "squeeze would drop it if one were left")
    return result


def resize(walk: Walk, node: Any) -> Value:
    """As `move`, to sizes that forward gives for all dimensions."""
    result = move(walk, node)
    _respect_sizes(walk, node, result, list(node.args[1]), first=0)
    return result


def unflatten(walk: Walk, node: Any) -> Value:
    """As `move`, to sizes that forward gives for the parts of one dimension."""
    result = move(walk, node)
    _respect_sizes(walk, node, result, list(node.args[2]), first=node.args[1] % len(walk.value(node.args[0]).shape))
    return result


def _respect_sizes(walk: Walk, node: Any, result: Value, sizes: list[int], first: int) -> None:
    """Sizes in forward: written as numbers, they stay; computed, all of a split dimension's parts keep the same.

    Args:
        walk: the walk.
        node: the call.
        result: its output, whose labels may be narrowed.
        sizes: of the output's dimensions from `first` on; -1 is free.
        first: the first dimension that they belong to.
    """
    varying = [dim for dim, size in enumerate(result.labels.shape) if size > 1]
    fixed = [dim for dim in varying if first <= dim < first + len(sizes) and sizes[dim - first] != -1]
    if not fixed:
        return
    if walk.literal:
        _pin_literal(walk, node, result.labels, f"{operator_name(node)} has sizes {sizes} written into forward")
        return
    walk.slots.assumed.append(node.name)
    free = next((dim for dim in varying if dim not in fixed), varying[-1])
    for dim in varying:
        if dim != free:
            row = result.labels.narrow(dim, 0, 1)
            walk.slots.unify(result.labels, row)
            result.labels = row


def _pin_literal(walk: Walk, node: Any, labels: Tensor, reason: str) -> None:
    walk.slots.pin(labels, reason)
    walk.slots.pinned[node.name] = reason


def split(walk: Walk, node: Any) -> list[Value]:
    """Parts of given sizes: equal parts lose the same channels, others none."""
    value = walk.value(node.args[0])
    dim, parts = _parts(node, value)
    if value.labels.shape[dim] > 1:
        _match_if_equal(walk, node, value, [part.labels for part in parts])
    return [_compressed(part) for part in parts]


def chunk(walk: Walk, node: Any) -> list[Value]:
    """A given number of parts: equal parts lose the same channels, others none."""
    value = walk.value(node.args[0])
    dim, parts = _parts(node, value)
    if value.labels.shape[dim] > 1:
        if len({part.shape for part in parts}) > 1:
            walk.slots.pin(value.labels, "chunk makes unequal parts of it")
        else:
            _match(walk, [part.labels for part in parts])
    return [_compressed(part) for part in parts]


def _parts(node: Any, value: Value) -> tuple[int, list[Value]]:
    """The dimension that is divided, and the values of the parts, not yet compressed."""
    dim = arguments(node)["dim"] % len(value.shape)
    parts, start = [], 0
    for output in node.meta["val"]:
        size = output.shape[dim]
        fields = (part if part.shape[dim] == 1 else part.narrow(dim, start, size) for part in value.fields())
        parts.append(Value(tuple(output.shape), *fields))
        start += size
    return dim, parts


def _match_if_equal(walk: Walk, node: Any, value: Value, labels: list[Tensor]) -> None:
    """Sizes of parts: equal ones may be computed from the input's shape."""
    if walk.literal or len({part.shape for part in labels}) > 1:
        _pin_literal(walk, node, value.labels, f"{operator_name(node)} has sizes written into forward")
    else:
        walk.slots.assumed.append(node.name)
        _match(walk, labels)


def _match(walk: Walk, labels: list[Tensor]) -> None:
    for part in labels[1:]:
        walk.slots.unify(labels[0], part)


def _compressed(value: Value) -> Value:
    return Value(value.shape, *map(compress, value.fields()))


def slice_(walk: Walk, node: Any) -> Value:
    """A range of one dimension; two halves of the channels lose the same ones, with other ranges all stay."""
    value = walk.value(node.args[0])
    given = arguments(node)
    dim, step = given["dim"] % len(value.shape), given["step"]
    size = value.shape[dim]
    start, stop, _ = slice(given["start"], given["end"], step).indices(size)
    shape = tuple(node.meta["val"].shape)
    parts = [
        part if part.shape[dim] == 1 else part[(slice(None),) * dim + (slice(start, stop, step),)]
        for part in value.fields()
    ]
    if value.labels.shape[dim] > 1 and shape[dim] != size:
        half = size % 2 == 0 and step == 1 and (start, stop) in ((0, size // 2), (size // 2, size))
        whole = value.labels
        _match_if_equal(walk, node, value, list(whole.chunk(2, dim)) if half else [whole.narrow(dim, 0, 1), whole])
    return Value(shape, *map(compress, parts))


def cat(walk: Walk, node: Any) -> Value:
    """One after another."""
    given = arguments(node)
    shape = tuple(node.meta["val"].shape)
    values = [walk.value(source) for source in given["tensors"]]
    values = [value for value in values if value.shape != (0,)]
    if not values:
        return Value.pinned(shape)
    rank = len(values[0].shape)
    dim = given["dim"] % rank
    joined = []
    for parts in zip(*(value.fields() for value in values), strict=True):
        shared = [max(part.shape[other] for part in parts) for other in range(rank)]
        sized = [
            part.expand([value.shape[dim] if other == dim else shared[other] for other in range(rank)])
            for part, value in zip(parts, values, strict=True)
        ]
        joined.append(compress(torch.cat(sized, dim)))
    return Value(shape, *joined)


def expand_as(walk: Walk, node: Any) -> Value:
    """Broadcast to the shape of another tensor, whatever that is."""
    value = walk.value(node.args[0])
    shape = tuple(node.meta["val"].shape)
    new = [1] * (len(shape) - len(value.shape))
    return Value(shape, *(part.reshape(new + list(part.shape)) for part in value.fields()))


def pad(walk: Walk, node: Any) -> Value:
    """Positions are added at the border."""
    value = walk.value(node.args[0])
    given = arguments(node)
    padded = range(len(value.shape) - len(given["pad"]) // 2, len(value.shape))
    if any(value.labels.shape[dim] > 1 for dim in padded):
        raise Unsupported("it adds channels")
    known = value.known
    if given["mode"] == "constant":
        known = known & (value.constant == (given["value"] or 0.0))
    return Value(tuple(node.meta["val"].shape), value.labels, value.constant, compress(known))


def new(walk: Walk, node: Any) -> Value:
    """A tensor made on the spot; its sizes may depend on its position in the network, so it is not cut."""
    return Value.pinned(tuple(node.meta["val"].shape))


def check(walk: Walk, node: Any) -> None:
    """Assertions on tensors, which have no output."""


_MOVES = """
    flatten unsqueeze unsqueeze_ permute transpose t numpy_T movedim swapaxes swapdims
""".split()
_NEW = """
    empty zeros ones full rand randn arange scalar_tensor empty_like zeros_like ones_like rand_like randn_like
""".split()

HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(_MOVES, move),
    **dict.fromkeys(("squeeze", "squeeze_"), squeeze),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand"), resize),
    "unflatten": unflatten,
    **dict.fromkeys(("split", "split_with_sizes"), split),
    "chunk": chunk,
    "slice": slice_,
    "cat": cat,
    "expand_as": expand_as,
    "pad": pad,
    **dict.fromkeys(_NEW, new),
    **dict.fromkeys(("_assert_tensor_metadata", "_assert_scalar"), check),
}
