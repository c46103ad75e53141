"""Counting multiply–accumulate operations: torch's counter, and what it does not know."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

_OF_TORCH = frozenset({"aten", "prim", "prims", "profiler", "higher_order"})


def operation_counter() -> FlopCounterMode:
    """Torch's counter, which also counts recurrent layers that run as one kernel, and products of groups (experts)."""
    known = {name: formula for name, formula in _FORMULAS.items() if hasattr(torch.ops.aten, name)}
    more = {getattr(torch.ops.aten, name): formula for name, formula in known.items()}
    return FlopCounterMode(display=False, custom_mapping=more)


def _of_one_layer(inputs: Sequence[int], *weights_and_more: Any, **_: Any) -> int:
    return _recurrent(inputs, weights_and_more[:2])


def _of_all_layers(inputs: Sequence[int], weights: Iterable[Sequence[int]], *_: Any, **__: Any) -> int:
    return _recurrent(inputs, weights)


def _recurrent(inputs: Sequence[int], weights: Iterable[Sequence[int]]) -> int:
    """Every weight is used once in every step: of inputs (T, N, features), or packed, (steps, features)."""
    return 2 * math.prod(inputs[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) > 1)


def _of_groups(left: Sequence[int], right: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """Rows of the left operand in groups, or columns (then the result has a dimension more, but no work more)."""
    rows = math.prod(out_shape) if len(left) + len(right) > 4 else left[0] * right[1]
    return 2 * rows * left[-1]


_FORMULAS = {
    "mkldnn_rnn_layer": _of_one_layer,
    "_cudnn_rnn": _of_all_layers,
    "miopen_rnn": _of_all_layers,
    "_grouped_mm": _of_groups,  # from torch 2.8 on
}


@contextlib.contextmanager
def noting_others() -> Iterator[dict[str, set[str]]]:
    """Inside, operators of other libraries that are given two matrices of numbers are noted: no counter knows these.

    Gives: name of the module that runs them → operators.
    """
    found: dict[str, set[str]] = {}
    with ModuleTracker() as tracker, _Watching() as watching:  # type: ignore[no-untyped-call]  # of torch
        watching.note = lambda operator: found.setdefault(max(tracker.parents, key=len), set()).add(operator)
        yield found


class _Watching(TorchDispatchMode):
    note: Callable[[str], None]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "aten") not in _OF_TORCH:
            given = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            if sum(each.ndim > 1 and each.is_floating_point() for each in given) > 1:
                self.note(func.name())
        return func(*args, **(kwargs or {}))
