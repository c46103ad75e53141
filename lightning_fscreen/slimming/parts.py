"""Handlers of the operators that take tensors apart and join them: split, slice, select, concatenate, stack."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_fscreen.slimming.elementwise import operand_of, unify_operands
from lightning_fscreen.slimming.interpreter import Handler, Unsupported, Walk, arguments, operator_name
from lightning_fscreen.slimming.slots import Value, compress

_MOST_PARTS = 4  # more equal parts than these are hardly ever cut out one by one


def split(walk: Walk, node: Any) -> list[Value]:
    """Parts of given sizes: equal parts lose the same channels, others any if each size is given by itself."""
    value = walk.value(node.args[0])
    dim, parts = _parts(node, value)
    if value.labels.shape[dim] > 1:
        _respect_sizes(walk, node, value, parts)
    return [_compressed(part) for part in parts]


def chunk(walk: Walk, node: Any) -> list[Value]:
    """A given number of parts: equal parts lose the same channels, others none."""
    value = _rows_of(walk, node) or walk.value(node.args[0])
    dim, parts = _parts(node, value)
    if value.labels.shape[dim] > 1:
        if len({part.shape for part in parts}) > 1:
            walk.slots.pin(value.labels, "chunk makes unequal parts of it")
        else:
            _match(walk, [part.labels for part in parts])
    return [_compressed(part) for part in parts]


def _rows_of(walk: Walk, node: Any) -> Value | None:
    """A parameter whose rows are divided: each part makes outputs of its own."""
    name = walk.name(node.args[0])
    if name is None or arguments(node)["dim"] != 0:
        return None
    shape = walk.shape(name)
    labels = walk.slots.dims.get((name, 0))
    labels = walk.slots.new(shape[0]) if labels is None else labels
    walk.slots.cut(name, 0, labels)
    value = Value.pinned(shape)
    return replace(value, labels=labels.reshape(-1, *[1] * (len(shape) - 1)), rows=(name, slice(0, shape[0])))


def glu(walk: Walk, node: Any) -> Value:
    """The first half times the sigmoid of the second: both lose the same channels."""
    value = walk.value(node.args[0])
    dim, shape = arguments(node)["dim"] % len(value.shape), tuple(node.meta["val"].shape)
    first, second = (
        [part if part.shape[dim] == 1 else part.narrow(dim, start, shape[dim]) for part in value.fields()]
        for start in (0, shape[dim])
    )
    walk.slots.unify(first[0], second[0])
    zero = first[2] & (first[1] == 0)
    constant = torch.where(zero, 0.0, first[1] * second[1].sigmoid())
    return Value(shape, first[0], constant, zero | (first[2] & second[2]))


def _parts(node: Any, value: Value) -> tuple[int, list[Value]]:
    """The dimension that is divided, and the values of the parts, not yet compressed."""
    dim = arguments(node)["dim"] % len(value.shape)
    parts, start = [], 0
    for output in node.meta["val"]:
        size = output.shape[dim]
        fields = (part if part.shape[dim] == 1 else part.narrow(dim, start, size) for part in value.fields())
        rows = None if value.rows is None else (value.rows[0], slice(start, start + size))
        parts.append(Value(tuple(output.shape), *fields, rows=rows))
        start += size
    return dim, parts


def _respect_sizes(walk: Walk, node: Any, value: Value, parts: list[Value]) -> None:
    """Sizes of parts: equal ones may be computed from the input's shape, others if each is given by itself."""
    dim = arguments(node)["dim"] % len(value.shape) - len(value.shape)
    equal = len({part.shape for part in parts}) == 1
    listed = operator_name(node) == "split_with_sizes"
    given = parts if listed else parts[:1]
    counted: dict[int, Tensor | int] = {place: part.along(dim) for place, part in enumerate(given)}
    if (equal or listed) and walk.is_computed(node, value, *parts, counted=counted, sizes=len(given), dim=dim):
        if equal:
            _match(walk, [part.labels for part in parts])
    else:
        walk.keep_all(node, value.labels, f"{operator_name(node)} has sizes written into forward")


def _match(walk: Walk, labels: list[Tensor]) -> None:
    for part in labels[1:]:
        walk.slots.unify(labels[0], part)


def _compressed(value: Value) -> Value:
    return Value(value.shape, *map(compress, value.fields()), rows=value.rows)


def slice_(walk: Walk, node: Any) -> Value:
    """A range of one dimension.

    Halves, thirds and quarters of the channels lose the same ones, since their bounds may be computed from the input's
    shape. Other bounds are taken for numbers: what they count stays, and only channels behind them can go.
    """
    value = walk.value(node.args[0])
    given = arguments(node)
    dim, step = given["dim"] % len(value.shape), given["step"]
    size = value.shape[dim]
    start, stop, _ = slice(given["start"], given["end"], step).indices(size)
    parts = [
        part if part.shape[dim] == 1 else part[(slice(None),) * dim + (slice(start, stop, step),)]
        for part in value.fields()
    ]
    result = Value(tuple(node.meta["val"].shape), *map(compress, parts))
    bounds = [bound for bound in (start, stop) if 0 < bound < size]
    if value.labels.shape[dim] > 1 and (bounds or step > 1):
        width = math.gcd(size, *bounds)
        reason = f"{operator_name(node)} has sizes written into forward"
        if step > 1 or not walk.is_computed(node, value, result):
            walk.keep_all(node, value.labels, reason)
        elif size // width <= _MOST_PARTS:
            _match(walk, list(value.labels.split(width, dim)))
        else:
            walk.keep_all(node, value.labels.narrow(dim, 0, max(bounds)), reason)
    return result


def select(walk: Walk, node: Any) -> Value:
    """One position, or one part of a stack."""
    value = walk.value(node.args[0])
    given = arguments(node)
    dim = given["dim"] % len(value.shape)
    if value.labels.shape[dim] > 1 and walk.heads.dims is not None:
        raise Unsupported("it takes a channel by its number")
    return _at(value, dim, given["index"])


def unbind(walk: Walk, node: Any) -> list[Value]:
    """All positions, or all parts of a stack."""
    value = walk.value(node.args[0])
    dim = arguments(node)["dim"] % len(value.shape)
    if value.labels.shape[dim] > 1 and walk.heads.dims is not None:
        raise Unsupported("it takes all channels apart")
    return [_at(value, dim, index) for index in range(value.shape[dim])]


def _at(value: Value, dim: int, index: int) -> Value:
    fields = (part.select(dim, index if part.shape[dim] > 1 else 0) for part in value.fields())
    return Value(value.shape[:dim] + value.shape[dim + 1 :], *map(compress, fields))


def cat(walk: Walk, node: Any) -> Value:
    """One after another."""
    given = arguments(node)
    shape = tuple(node.meta["val"].shape)
    vectors = len(shape) == 1  # biases, one after the other
    values = [operand_of(walk, source) if vectors else walk.value(source) for source in given["tensors"]]
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
    across = [value.labels for value in values]
    if walk.heads.dims is not None and all(labels.shape[dim] == 1 for labels in across):
        widest = max(across, key=Tensor.numel)
        if widest.numel() > 1:  # channels of all parts meet
            _match(walk, [widest, *across])
            joined[0] = widest
    if walk.heads.dims is None and all(labels.shape[dim] == 1 for labels in across):
        varying = [labels for labels in across if labels.numel() > 1]
        least = min(varying, key=Tensor.numel, default=across[0])
        for labels in varying:  # zeros that are made for every head, for instance
            if all(a <= b for a, b in zip(least.shape, labels.shape, strict=True)):
                walk.slots.unify(least, labels)
        joined[0] = least
    return Value(shape, *joined)


def lookup(walk: Walk, node: Any) -> Value:
    """Parts of a table or tensor, by their numbers along one dimension: the others stay as they are."""
    given = arguments(node)
    table, numbers = (given["weight"], [given["indices"]]) if "weight" in given else (node.args[0], given["indices"])
    places = [place for place, item in enumerate(numbers) if item is not None]
    if any(numbers[place].meta["val"].dtype == torch.bool for place in places):
        raise Unsupported("how many elements it takes depends on values")
    if len(places) != 1:
        return _at_places(walk, node, dict(zip(places, (numbers[place] for place in places), strict=True)))
    (place,) = places
    value = _table(walk, table, 1 - place)
    if (name := walk.name(table)) is not None and len(walk.shape(name)) == 2:  # it may be an output layer's, too
        entries = walk.slots.new(walk.shape(name)[place])
        walk.slots.cut(name, place, entries)
        walk.slots.pin(entries, "it is looked up by its number in a table that shares its weight")
    if value.labels.shape[place] > 1:
        if walk.heads.dims is not None:
            raise Unsupported("it takes channels by their numbers")
        value = replace(value, labels=value.labels.narrow(place, 0, 1))
    same = value.constant.shape[place] == value.known.shape[place] == 1
    known = value.known if same else torch.zeros_like(value.known.narrow(place, 0, 1))
    constant = value.constant if same else torch.zeros_like(value.constant.narrow(place, 0, 1))
    new = [1] * numbers[place].meta["val"].ndim

    def spread(part: Tensor) -> Tensor:
        return part.reshape(*part.shape[:place], *new, *part.shape[place + 1 :])

    return Value(tuple(node.meta["val"].shape), spread(value.labels), spread(constant), spread(known))


def _at_places(walk: Walk, node: Any, numbers: Mapping[int, Any]) -> Value:
    """Positions by their numbers in several dimensions, none of which is one of channels."""
    value = walk.value(node.args[0])
    if walk.heads.dims is None or any(part.shape[place] > 1 for part in value.fields() for place in numbers):
        raise Unsupported("it takes elements apart by their numbers")
    if any(walk.value(item).labels.numel() > 1 for item in numbers.values()):
        raise Unsupported("it takes other elements of every channel")
    first = {place: torch.zeros(tuple(item.meta["val"].shape), dtype=torch.int64) for place, item in numbers.items()}
    index = tuple(first.get(place, slice(None)) for place in range(len(value.shape)))
    return Value(tuple(node.meta["val"].shape), *(compress(part[index]) for part in value.fields()))


def _table(walk: Walk, source: Any, dim: int) -> Value:
    """A tensor; a parameter with two dimensions gets slots along one of them."""
    name = walk.name(source)
    if name is None or len(walk.shape(name)) != 2:
        return walk.value(source)
    labels = walk.slots.dims.get((name, dim))
    labels = walk.slots.new(walk.shape(name)[dim]) if labels is None else labels
    walk.slots.cut(name, dim, labels)
    return replace(
        Value.pinned(walk.shape(name)), labels=labels.reshape([-1 if dim == 0 else 1, -1 if dim == 1 else 1])
    )


def gather(walk: Walk, node: Any) -> Value:
    """Elements by their numbers along one dimension, which the others have numbers of their own for."""
    given = arguments(node)
    value, numbers = walk.value(given["self"]), walk.value(given["index"])
    rank, shape = len(value.shape), numbers.shape
    dim = given["dim"] % max(rank, 1)
    if walk.heads.dims is not None and value.labels.numel() > 1 and value.labels.shape[dim] > 1:
        raise Unsupported("it takes channels by their numbers")
    others = [place for place, size in enumerate(value.labels.shape) if size > 1 and place != dim]
    if any(shape[place] != value.shape[place] for place in others):
        raise Unsupported("it takes elements of the first channels only")
    labels, own = (part.labels.narrow(dim, 0, 1) if rank else part.labels for part in (value, numbers))
    if walk.heads.dims is not None or all(a <= b for a, b in zip(own.shape, labels.shape, strict=True)):
        walk.slots.unify(labels, own)
    if numbers.labels.numel() > own.numel():  # numbers are added where the dimension is one of channels
        walk.slots.pin(numbers.labels, "it is a number of an element")
    return replace(Value.pinned(shape), labels=labels)


def stack(walk: Walk, node: Any) -> Value:
    """Parts of one shape along a new dimension: they lose the same channels."""
    given = arguments(node)
    values = [walk.value(source) for source in given["tensors"]]
    shape = tuple(node.meta["val"].shape)
    dim = given["dim"] % len(shape)
    labels = unify_operands(walk, values, values[0].shape)
    constants = torch.broadcast_tensors(*(value.constant for value in values))
    known = torch.broadcast_tensors(*(value.known for value in values))
    return Value(shape, labels.unsqueeze(dim), compress(torch.stack(constants, dim)), compress(torch.stack(known, dim)))


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("split", "split_with_sizes"), split),
    "chunk": chunk,
    "glu": glu,
    "slice": slice_,
    "select": select,
    "unbind": unbind,
    "cat": cat,
    "stack": stack,
    **dict.fromkeys(("index", "embedding"), lookup),
    "gather": gather,
}
