"""Sizes that a forward computes from others (`C // num_heads`, `x.shape[-1]`) follow the units that they count.

Where they are attributes of a module, those change (`attributes.py`). Others are numbers that no attribute holds: while
the module runs, the calls that take them get smaller ones.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

SIZED = ("view", "reshape", "unflatten", "expand", "split")
"""The calls that are given sizes."""

Sizes = dict[str, dict[tuple[int, int], tuple[int, int]]]
"""Module → {(number of the call in its forward, place of the size): (size before, and after)}."""


@dataclass(frozen=True)
class Call:
    """A call that is given sizes.

    Attributes:
        module: the module whose forward makes it.
        number: how many such calls come before it in that forward.
        counted: place of a size → slots that it counts.
    """

    module: str
    number: int
    counted: Mapping[int, Tensor]


def numbered_calls(graph: fx.Graph, name_of: Callable[[fx.Node], str]) -> dict[str, tuple[str, int]]:
    """Node → the module whose forward makes this call, and the call's number in it, of the first run of the forward."""
    counts: Counter[str] = Counter()
    numbers: dict[str, tuple[str, int]] = {}
    for node in graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).items())
        if node.op != "call_function" or name_of(node) not in SIZED or not stack:
            continue
        key, (module, *_) = stack[-1]
        numbers[node.name] = (module, counts[key])
        counts.update(outer for outer, _ in stack)
    return numbers


def proposed_sizes(calls: Iterable[Call], kept: Tensor) -> Sizes:
    """The sizes that calls need, for the inputs that the network was captured with.

    Args:
        calls: that are given sizes.
        kept: (number of slots,) bool.
    """
    proposed: Sizes = {}
    for call in calls:
        for place, labels in call.counted.items():
            left = int(kept[labels].sum())
            if left < len(labels):
                proposed.setdefault(call.module, {})[call.number, place] = (len(labels), left)
    return proposed


def stale_sizes(network: nn.Module, proposed: Sizes, run: Callable[[], object]) -> Sizes:
    """Those of the proposed sizes that calls are not given by themselves, as shares.

    Args:
        network: has become smaller already.
        proposed: from `proposed_sizes`.
        run: runs it on the inputs that it was captured with. May fail where other numbers are wrong.
    """
    stale: Sizes = {}
    before = {name: vars(network.get_submodule(name)).get("forward") for name in proposed}
    try:
        for name, sizes in proposed.items():
            module = network.get_submodule(name)
            module.forward = SizedForward(module, sizes, stale.setdefault(name, {}))
        run()
    finally:
        _put_back(network, before)
    return {name: sizes for name, sizes in stale.items() if sizes}


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
        sizes: (number of the call, place of the size) → (size before, and after): what the call is given is multiplied
            by their quotient, since sizes may also count instances.
        stale: where it is to be found out which calls are given the sizes before: gets those that are, as shares.
    """

    def __init__(
        self,
        module: nn.Module,
        sizes: Mapping[tuple[int, int], tuple[int, int]],
        stale: dict[tuple[int, int], tuple[int, int]] | None = None,
    ) -> None:
        self._module = module
        self.own = vars(module).get("forward")
        self.sizes = dict(sizes)
        self._stale = stale

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
        with _Resizing(self.sizes, self._stale):
            return self._forward(*args, **kwargs)


class _Resizing(TorchFunctionMode):
    """Counts the calls that are given sizes, and gives some of them others."""

    def __init__(
        self,
        sizes: Mapping[tuple[int, int], tuple[int, int]],
        stale: dict[tuple[int, int], tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        self._sizes = sizes
        self._stale = stale
        self._calls = {call for call, _ in sizes}
        self._count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") not in SIZED:
            return func(*args, **(kwargs or {}))
        number, self._count = self._count, self._count + 1
        if number not in self._calls:
            return func(*args, **(kwargs or {}))
        head, sizes, tail, kwargs = _parted(func.__name__, args, dict(kwargs or {}))
        if isinstance(sizes, int):
            return func(*head, self._scaled(number, 0, sizes), *tail, **kwargs)
        return func(*head, [self._scaled(number, place, size) for place, size in enumerate(sizes)], *tail, **kwargs)

    def _scaled(self, number: int, place: int, size: Any) -> Any:
        pair = self._sizes.get((number, place))
        if pair is None or size == -1:
            return size
        if self._stale is not None:
            if size != pair[0]:
                return size
            share = Fraction(pair[1], pair[0])
            self._stale[number, place] = (share.denominator, share.numerator)
        return size * pair[1] // pair[0]


_KEYWORDS = ("size", "sizes", "shape", "split_size", "split_size_or_sections")


def _parted(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], Any, tuple[Any, ...], dict[str, Any]]:
    """Arguments before the sizes, the sizes, and those behind them, by their places and by their names."""
    keyword = next((key for key in _KEYWORDS if key in kwargs), None)
    if keyword is not None:
        return args, kwargs.pop(keyword), (), kwargs
    first = 2 if name == "unflatten" and len(args) > 1 else 1
    if name in ("split", "unflatten") or isinstance(args[first], list | tuple):
        return args[:first], args[first], args[first + 1 :], kwargs
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
            own = followed_sizes({name: forward.sizes}, {name: own})[name] if keep else {}
            vars(module).pop("forward")
            if forward.own is not None:
                vars(module)["forward"] = forward.own
        if own:
            module.forward = SizedForward(module, own)

    return partial(_put_back, network, before)


def followed_sizes(first: Sizes, second: Sizes) -> Sizes:
    """The changes of two slimmings, one after the other."""
    total = {module: dict(values) for module, values in first.items()}
    for module, values in second.items():
        own = total.setdefault(module, {})
        for place, (before, after) in values.items():
            share = Fraction(after, before) * Fraction(*reversed(own.get(place, (1, 1))))
            own[place] = (share.denominator, share.numerator)
    return total


def sizes_to_json(sizes: Sizes) -> dict[str, list[list[int]]]:
    """As lists."""
    return {module: [[*place, *pair] for place, pair in values.items()] for module, values in sizes.items()}


def sizes_from_json(data: Mapping[str, Any], integer: Callable[[Any], int]) -> Sizes:
    """From what `sizes_to_json` gave."""
    rows = {module: [tuple(map(integer, row)) for row in values] for module, values in data.items()}
    return {
        str(module): {(call, place): (before, after) for call, place, before, after in values}
        for module, values in rows.items()
    }
