"""Tensors that share memory: what is written to a view is seen by its base and by all other views of it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from lightning_fscreen.slimming.slots import Value, compress

_RESHAPING = {"squeeze_", "unsqueeze_", "transpose_", "swapaxes_", "swapdims_", "t_"}


class Aliases:
    """The views of a graph. Slots and constants are written through them by torch's own views.

    Args:
        values: node → its value at the present point of the walk; changed in place.
    """

    def __init__(self, values: dict[fx.Node, Any]) -> None:
        self._values = values
        self._sources: dict[fx.Node, fx.Node] = {}  # view → the tensor, or list of tensors, that it shows; in order

    def note(self, node: Any) -> None:
        """Remember what a node is a view of, if it is one."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return
        if node.target is operator.getitem:
            if source in self._sources:
                self._sources[node] = source
        elif isinstance(node.target, OpOverload) and node.target._schema.arguments[0].alias_info is not None:  # noqa: SLF001
            self._sources[node] = source

    def write(self, node: fx.Node, value: Value) -> None:
        """Give a tensor another value, and all others that share its memory theirs."""
        path = [node]
        while path[0] in self._sources:
            path.insert(0, self._sources[path[0]])
        base = path[0]
        before = self._values[base]
        if len(path) > 1:
            parts = zip(before.parts(), value.parts(), strict=True)
            self._values[base] = Value(before.shape, *(compress(_written(path, own, new)) for own, new in parts))
        else:
            self._values[base] = value
        changed = {base}
        for view, source in self._sources.items():
            if source in changed and view in self._values:
                changed.add(view)
                self._values[view] = value if view is node else self._seen(view, source)

    def _seen(self, view: Any, source: Any) -> Any:
        """What a view shows of its source."""
        value = self._values[source]
        if view.target is operator.getitem or _writes(view):
            return _show(view, value)
        parts = [_laid_out(source, part) for part in value.parts()]
        shown = [_show(view, part) for part in parts]
        if isinstance(shown[0], Tensor):
            if shown[0].untyped_storage().data_ptr() != parts[0].untyped_storage().data_ptr():
                return self._values[view]  # a copy
            return Value(tuple(shown[0].shape), *map(compress, shown))
        return [Value(tuple(item[0].shape), *map(compress, item)) for item in zip(*shown, strict=True)]


def _laid_out(node: Any, part: Tensor) -> Tensor:
    """With the strides of the tensor itself, which decide whether `reshape` and the like give a view or a copy."""
    strides = node.meta["val"].stride()
    if 0 in strides or node.meta["val"].shape != part.shape:  # expanded: nobody can write to it; or resized
        return part.contiguous()
    return torch.empty_strided(part.shape, strides, dtype=part.dtype).copy_(part)


def _written(path: list[Any], own: Tensor, new: Tensor) -> Tensor:
    """A base after a write through the views of a path, which leads from it to the tensor that is written to."""
    base = shown = _laid_out(path[0], own)
    for view in path[1:]:
        shown = _show(view, shown)
    shown.copy_(new)
    return base


def _show(view: Any, source: Any) -> Any:
    if view.target is operator.getitem:
        return source[view.args[1]]
    if reshapes(view):
        source = source.detach()  # the tensor itself keeps its shape
    return source if _writes(view) else view.target(source, *view.args[1:], **view.kwargs)


def _writes(view: Any) -> bool:
    """Whether it is an operator in place, which returns what it writes to."""
    return bool(view.target._schema.arguments[0].alias_info.is_write) and not reshapes(view)  # noqa: SLF001


def reshapes(view: Any) -> bool:
    """Whether it is an operator in place that writes no element: it returns a view of what was there before."""
    return view.target._schema.name.rpartition("::")[2] in _RESHAPING  # noqa: SLF001
