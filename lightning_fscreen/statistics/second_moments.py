"""Sums Σ x xᵀ over what some weights multiply, from which any of these inputs can be regressed on the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_fscreen.functional.precision import without_tf32
from lightning_fscreen.statistics.padding import Tokens

_TRANSPOSED = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, *_TRANSPOSED}
_PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
_ADDED = {torch.addmm, Tensor.addmm}  # (bias, x, W)


class SecondMoments(TorchFunctionMode):
    """Within this mode, Σ x xᵀ of the inputs x that functions are given along with some weights.

    Functions are linear layers, products of matrices and convolutions, wherever they are called; what a fused function
    hides (`nn.MultiheadAttention`, TorchScript) is not seen. Every position of a convolution, and every token, counts
    as an instance of its own.

    Args:
        inputs: weight → (copies, features) int64, the input that each of its features is; where a feature comes in
            several copies (the positions of a flattened channel), these are instances, too.
    """

    def __init__(self, inputs: Mapping[Tensor, Tensor]) -> None:
        super().__init__()
        self._inputs = {id(weight): places.to(weight.device) for weight, places in inputs.items()}
        self._in_order = {
            id(weight) for weight, places in inputs.items() if places.tolist() == [list(range(places.numel()))]
        }
        self._sums: dict[int, Tensor] = {}
        self._instances: dict[int, int] = {}
        self._tokens: Tokens | None = None

    def counting(self, tokens: Tokens | None) -> SecondMoments:
        """The mode, for a batch of which only these tokens count; None for all."""
        self._tokens = tokens
        return self

    @property
    def instances(self) -> int:
        """How many have been seen, of the weight that has seen most."""
        return max(self._instances.values(), default=0)

    def of(self, weight: Tensor) -> tuple[Tensor, int] | None:
        """(features, features), at least float32, and the number of instances, without their positions; or None.

        Raises:
            ValueError: NaN or inf among them.
        """
        found = self._sums.get(id(weight))
        if found is not None and not bool(found.isfinite().all()):
            raise ValueError(
                f"inputs of a weight of shape {tuple(weight.shape)}, or their squares, are NaN or inf; check them "
                "and the weights before it"
            )
        return None if found is None else (found, self._instances[id(weight)])

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS or func in _PRODUCTS or func in _ADDED:
            given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            place = 1 if func in _ADDED else 0
            if len(given) > place + 1 and id(weight := _whole(given[place + 1])) in self._inputs:
                self._add(given[place], weight, func in _CONVOLUTIONS)
        return func(*args, **kwargs)

    @torch.no_grad()
    def _add(self, values: Tensor, weight: Tensor, convolution: bool) -> None:
        key = id(weight)
        if convolution:
            dim = values.ndim - (weight.ndim - 2) - 1
            rows = values.movedim(dim, -1)
        else:
            rows = values if self._tokens is None else self._tokens.counted(values)
        if rows.numel() == 0:  # no instance has come here (to an expert, say)
            return
        places = self._inputs[key]
        rows = rows.to(torch.promote_types(values.dtype, torch.float32)).reshape(-1, rows.shape[-1])
        rows = rows if key in self._in_order else rows[:, places.flatten()].view(-1, places.shape[1])
        with without_tf32():
            products = rows.mT @ rows
        self._sums[key] = self._sums[key].add_(products) if key in self._sums else products
        self._instances[key] = self._instances.get(key, 0) + len(values)


def _whole(weight: Tensor) -> Tensor:
    """The tensor that this is all of, with its dimensions in another order or without those of size 1."""
    base = weight._base  # noqa: SLF001 - views have no other name for it
    return base if base is not None and _layout(base) == _layout(weight) else weight


def _layout(tensor: Tensor) -> tuple[int, list[tuple[int, int]]]:
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.data_ptr(), sorted((size, stride) for size, stride in sizes if size > 1)
