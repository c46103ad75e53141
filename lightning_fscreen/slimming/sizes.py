"""Sizes that a forward computes from others (`C // num_heads`, `x.shape[-1]`) follow the units that they count.

Where they are attributes of a module, those change (`attributes.py`). Others are numbers that no attribute holds: while
the module runs, the calls that are given them get smaller ones.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SIZED = ("view", "reshape", "unflatten", "expand", "broadcast_to", "split", "repeat", "repeat_interleave")
"""The calls that are given sizes."""


@dataclass(frozen=True)
class Call:
    """A call that is given sizes.

    Attributes:
        module: the module whose forward makes it.
        name: which call it is, one of `SIZED`.
        sizes: how many sizes it is given.
        counted: place of a size → slots that it counts, in the order of the elements; or their number, if all stay. The
            others are -1.
        shape: of its input.
        reads: dimension of its input, from the last one → slots that lie along it.
        dim: the dimension that it divides, from the last one; None if it divides none in particular.
    """

    module: str
    name: str
    sizes: int
    counted: Mapping[int, Tensor | int]
    shape: tuple[int, ...]
    reads: Mapping[int, Tensor]
    dim: int | None = None


@dataclass(frozen=True)
class Size:
    """A size that a call is given becomes another one, where its input has become smaller.

    Attributes:
        name: which call it is, one of `SIZED`.
        sizes: how many sizes it is given.
        place: the place of this one among them.
        before: what the call is given; 0 for anything else than `after`.
        after: what it gets.
        times: whether instances are counted with it, so that it may be any multiple of `before`.
        reads: the input by which the call is known: (dimension from the last one, its size) of what has become smaller.
        dim: the dimension that the call divides, from the last one; None if it divides none in particular.
        shape: of the whole input, where that is known.
        given: all sizes as they were captured, where they are known.
    """

    name: str
    sizes: int
    place: int
    before: int
    after: int
    times: bool = False
    reads: tuple[tuple[int, int], ...] = ()
    dim: int | None = None
    shape: tuple[int, ...] = ()
    given: tuple[int, ...] = ()

    def may_be_of(self, name: str, source: Tensor, sizes: Sequence[Any], dim: int | None) -> bool:
        """Whether a call has such an input and as many sizes, all but one of them as captured, where that is known."""
        if (name, len(sizes), dim) != (self.name, self.sizes, self.dim):
            return False
        if any(source.dim() < -place or source.shape[place] != size for place, size in self.reads):
            return False
        if self.shape and tuple(source.shape) != self.shape:
            return False
        return not self.given or self.agreement(sizes) >= self.sizes - 1

    def is_among(self, sizes: Sequence[Any]) -> bool:
        """Whether a call is given what becomes another."""
        size = sizes[self.place]
        if self.before == 0:
            return bool(size not in (-1, self.after))
        return bool(size > 0 and size % self.before == 0 if self.times else size == self.before)

    def agreement(self, sizes: Sequence[Any]) -> int:
        """How many sizes of a call are those that were captured: what tells two calls with the same input apart."""
        return sum(size == captured for size, captured in zip(sizes, self.given, strict=False))

    def found(self, size: int) -> Size:
        """With what a call was found to be given."""
        share = Fraction(self.after, size)
        before, after = (share.denominator, share.numerator) if self.times else (size, self.after)
        return replace(self, before=before, after=after, shape=(), given=())


Sizes = dict[str, tuple[Size, ...]]
"""Module → the sizes that become others in its forward."""


def proposed_sizes(calls: Iterable[Call], kept: Tensor) -> Sizes:
    """The sizes that calls need, for the inputs that the network was captured with, whatever they are given.

    Args:
        calls: that are given sizes.
        kept: (number of slots,) bool.
    """
    proposed: dict[str, dict[Size, None]] = {}
    for call in calls:
        left = {dim: int(kept[labels].sum()) for dim, labels in sorted(call.reads.items())}
        shape = tuple(left.get(dim - len(call.shape), size) for dim, size in enumerate(call.shape))
        alone = [dim for dim, labels in call.reads.items() if len(repeated(labels)) == len(labels)]
        reads = tuple((dim, left[dim]) for dim in sorted(alone))  # others' sizes depend on the number of instances
        given = [call.counted.get(place, -1) for place in range(call.sizes)]
        captured = tuple(size if isinstance(size, int) else len(size) for size in given)
        for place, counted in call.counted.items():
            needed = counted if isinstance(counted, int) else int(kept[counted].sum())
            times = isinstance(counted, Tensor) and len(repeated(counted)) < len(counted)
            size = Size(call.name, call.sizes, place, 0, needed, times, reads, call.dim, shape, captured)
            proposed.setdefault(call.module, {})[size] = None
    return {module: tuple(sizes) for module, sizes in proposed.items()}


def repeated(labels: Tensor) -> Tensor:
    """What is repeated in labels as a whole, once for every instance; all of them if nothing is."""
    first = len(labels.unique())
    whole = labels[:first].repeat(-(-len(labels) // first))[: len(labels)]
    return labels[:first] if torch.equal(labels, whole) else labels


def stale_sizes(network: nn.Module, proposed: Sizes, run: Callable[[], object]) -> Sizes:
    """Those of the proposed sizes that calls do not get by themselves.

    Args:
        network: has become smaller already.
        proposed: from `proposed_sizes`.
        run: runs the network. May fail where other numbers are wrong.
    """
    met: dict[str, dict[Size, None]] = {}
    before = {name: vars(network.get_submodule(name)).get("forward") for name in proposed}
    try:
        for name, sizes in proposed.items():
            module = network.get_submodule(name)
            module.forward = SizedForward(module, sizes, met.setdefault(name, {}))
        run()
    finally:
        _put_back(network, before)
    return {name: tuple(sizes) for name, sizes in met.items() if sizes}


def _put_back(network: nn.Module, before: Mapping[str, Any]) -> None:
    for name, forward in before.items():
        values = vars(network.get_submodule(name))
        values.pop("forward", None)
        if forward is not None:
            values["forward"] = forward


class SizedForward:
    """The forward of a module, in which some calls get other sizes. It stands in the module's place for `forward`.

    Args:
        module: the module.
        sizes: what becomes another.
        met: gets what calls were given.
    """

    def __init__(self, module: nn.Module, sizes: Sequence[Size], met: dict[Size, None] | None = None) -> None:
        self._module = module
        self.own = vars(module).get("forward")
        self.sizes = tuple(sizes)
        self._met = met

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the method."""
        return inspect.signature(self._forward)

    @property
    def _forward(self) -> Callable[..., Any]:
        forward: Callable[..., Any] = type(self._module).forward.__get__(self._module)
        return forward if self.own is None else self.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        with _Resizing(self.sizes, self._met):
            return self._forward(*args, **kwargs)


class _Resizing(TorchFunctionMode):
    """Gives calls other sizes."""

    def __init__(self, sizes: Sequence[Size], met: dict[Size, None] | None = None) -> None:
        super().__init__()
        self._sizes = sizes
        self._met = met

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name not in SIZED:
            return func(*args, **(kwargs or {}))
        head, sizes, tail, rest = _parted(name, args, dict(kwargs or {}))
        given = list(sizes) if isinstance(sizes, list | tuple) else [sizes]
        if not head or not given or any(isinstance(size, torch.dtype) for size in given):  # view(dtype)
            return func(*args, **(kwargs or {}))
        dim = _divided(name, head, tail, rest)
        changed = list(given)
        fits = name in ("view", "reshape") and -1 not in given and math.prod(given) == head[0].numel()
        for size in () if fits else self._for(name, head[0], given, dim):  # a call that is right as it is
            size = size.found(given[size.place]) if self._met is not None else size
            changed[size.place] = given[size.place] // size.before * size.after
            if self._met is not None:
                self._met[size] = None
        return func(*head, changed if isinstance(sizes, list | tuple) else changed[0], *tail, **rest)

    def _for(self, name: str, source: Tensor, given: Sequence[Any], dim: int | None) -> list[Size]:
        """The sizes that a call gets."""
        sizes = [size for size in self._sizes if size.may_be_of(name, source, given, dim)]
        best = max((size.agreement(given) for size in sizes), default=0)
        return [size for size in sizes if size.agreement(given) == best and size.is_among(given)]


def _divided(name: str, head: tuple[Any, ...], tail: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """The dimension that a call divides, from the last one."""
    if name not in _DIVIDING or not head:
        return None
    dim: Any = kwargs.get("dim", head[1] if len(head) > 1 else tail[0] if tail else 0)
    return int(dim) if dim < 0 else int(dim) - head[0].dim()


_KEYWORDS = ("size", "sizes", "shape", "split_size", "split_size_or_sections", "repeats")
_DIVIDING = ("unflatten", "split", "repeat_interleave")


def _parted(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], Any, tuple[Any, ...], dict[str, Any]]:
    """Arguments before the sizes, the sizes, and those behind them, by their places and by their names."""
    keyword = next((key for key in _KEYWORDS if key in kwargs), None)
    if keyword is not None:
        return args, kwargs.pop(keyword), (), kwargs
    first = 2 if name == "unflatten" and len(args) > 1 else 1
    if name in _DIVIDING or len(args) == first or isinstance(args[first], list | tuple):
        return args[:first], args[first] if len(args) > first else (), args[first + 1 :], kwargs
    return args[:first], args[first:], (), kwargs


def set_sizes(network: nn.Module, sizes: Sizes, keep: bool = True) -> Callable[[], None]:
    """Let the forwards of modules use these sizes; returns what undoes it.

    Args:
        network: holds the modules.
        sizes: that change, from those that the forwards use now.
        keep: whether to keep what changed before; else forwards become as they were written.
    """
    before = {name: vars(network.get_submodule(name)).get("forward") for name in sizes}
    for name, own in sizes.items():
        module, forward = network.get_submodule(name), before[name]
        if isinstance(forward, SizedForward):
            own = _followed(forward.sizes, own) if keep else ()
            vars(module).pop("forward")
            if forward.own is not None:
                vars(module)["forward"] = forward.own
        if own:
            module.forward = SizedForward(module, own)
    return partial(_put_back, network, before)


def followed_sizes(first: Sizes, second: Sizes) -> Sizes:
    """The changes of two slimmings, one after the other."""
    return {name: _followed(first.get(name, ()), second.get(name, ())) for name in first | second}


def _followed(first: Sequence[Size], second: Sequence[Size]) -> tuple[Size, ...]:
    """What the second slimming makes smaller, it makes smaller from what the first one has left."""
    total: list[Size] = []
    later = list(second)
    for size in first:
        after = next((other for other in later if _goes_on(size, other)), None)
        if after is None:
            total.append(size)
            continue
        later.remove(after)
        share = Fraction(size.after, size.before) * Fraction(after.after, after.before)
        before = share.denominator if size.times else size.before
        total.append(replace(after, before=before, after=int(before * share), times=size.times))
    return (*total, *later)


def _goes_on(first: Size, second: Size) -> bool:
    same = all(getattr(first, key) == getattr(second, key) for key in ("name", "sizes", "place", "times", "dim"))
    return same and (first.times or first.after == second.before)


def sizes_to_json(sizes: Sizes) -> dict[str, list[list[Any]]]:
    """As lists."""
    return {
        module: [
            [s.name, s.sizes, s.place, s.before, s.after, s.times, [list(read) for read in s.reads], s.dim] for s in own
        ]
        for module, own in sizes.items()
    }


def sizes_from_json(data: Mapping[str, Any], integer: Callable[[Any], int]) -> Sizes:
    """From what `sizes_to_json` gave."""

    def size(row: Any) -> Size:
        name, *numbers, times, reads, dim = row
        count, place, before, after = map(integer, numbers)
        known = tuple((integer(dim), integer(size)) for dim, size in reads)
        return Size(str(name), count, place, before, after, times is True, known, None if dim is None else integer(dim))

    return {str(module): tuple(map(size, own)) for module, own in data.items()}
