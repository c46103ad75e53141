"""Attributes of modules follow the channels: sizes in `forward` that count them (`self.channels`), eps of norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_fscreen.slimming.sizes import Call
from lightning_fscreen.slimming.slots import Assumption, Value

Size = int | tuple[int, ...]
Setting = Size | float | None
Attributes = dict[str, dict[str, tuple[Setting, Setting]]]
"""Module → {attribute: (its value before, and after)}: sizes, and the eps of norms."""


@dataclass(frozen=True)
class Resized:
    """The shape of a tensor, before and after."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def proposed_attributes(
    network: nn.Module, assumptions: Iterable[Assumption], kept: Tensor, given: bool = False
) -> Attributes:
    """Attributes that equal a size in their module's forward, and the value that they would need.

    They are guesses: verification decides.

    Args:
        network: the network, not yet changed.
        assumptions: calls that have sizes in them.
        kept: (number of slots,) bool.
        given: only sizes that calls are given, where these are known; else any of what they take and give.
    """
    proposed: Attributes = {}
    for assumption in assumptions:
        if given and assumption.call is not None:
            shapes = [_given(assumption.call, kept)]
        else:
            shapes = [_resized(value, kept) for value in assumption.values]
        for name, old in vars(network.get_submodule(assumption.module)).items():
            new = _new(old, shapes) if not name.startswith("_") else None
            if new is not None and new != old:
                proposed.setdefault(assumption.module, {}).setdefault(name, (old, new))
    return proposed


def _resized(value: Value, kept: Tensor) -> Resized:
    after = list(value.shape)
    for dim, size in enumerate(value.labels.shape):
        if size > 1:
            rows = value.labels.movedim(dim, 0).reshape(size, -1)[:, 0]
            after[dim] = int(kept[rows].sum())
    return Resized(value.shape, tuple(after))


def _given(call: Call, kept: Tensor) -> Resized:
    sizes = [call.counted.get(place, -1) for place in range(call.sizes)]
    before = tuple(size if isinstance(size, int) else len(size) for size in sizes)
    return Resized(before, tuple(size if isinstance(size, int) else int(kept[size].sum()) for size in sizes))


def _new(old: Any, shapes: Iterable[Resized]) -> Size | None:
    """A size alone, or several that stand next to each other in a shape."""
    if type(old) is int and old > 1:
        pairs = [pair for shape in shapes for pair in zip(shape.before, shape.after, strict=True)]
        return next((after for before, after in pairs if before == old and after != old), None)
    if isinstance(old, tuple) and old and all(type(size) is int for size in old):
        for shape in shapes:
            for start in range(len(shape.before) - len(old) + 1):
                stop = start + len(old)
                if shape.before[start:stop] == tuple(old) and shape.after[start:stop] != tuple(old):
                    return shape.after[start:stop]
    return None


def set_attributes(network: nn.Module, attributes: Attributes, before: bool = False) -> Callable[[], None]:
    """Give modules their values after slimming, or `before` it; returns a function that undoes it."""
    old = [(network.get_submodule(module), name) for module, values in attributes.items() for name in values]
    restore = [(module, name, getattr(module, name)) for module, name in old]
    for module, values in attributes.items():
        for name, pair in values.items():
            setattr(network.get_submodule(module), name, pair[0 if before else 1])

    def undo() -> None:
        for module, name, value in restore:
            setattr(module, name, value)

    return undo


def followed(first: Attributes, second: Attributes) -> Attributes:
    """The changes of two slimmings, one after the other."""
    total = {module: dict(values) for module, values in first.items()}
    for module, values in second.items():
        own = total.setdefault(module, {})
        for name, (before, after) in values.items():
            own[name] = (own[name][0] if name in own else before, after)
    return total


def attributes_to_json(attributes: Attributes) -> dict[str, Any]:
    """As lists."""
    return {module: {name: list(pair) for name, pair in values.items()} for module, values in attributes.items()}


def attributes_from_json(data: Mapping[str, Any], integer: Callable[[Any], int]) -> Attributes:
    """From what `attributes_to_json` gave."""

    def setting(value: Any) -> Setting:
        if value is None or (isinstance(value, float) and 0 <= value < math.inf):
            return value
        return tuple(map(integer, value)) if isinstance(value, list) else integer(value)

    return {
        str(module): {str(name): (setting(before), setting(after)) for name, (before, after) in values.items()}
        for module, values in data.items()
    }
