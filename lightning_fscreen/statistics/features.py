"""From an activation to features: an element-wise function, and the mean over positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_fscreen.modules import is_transposed_linear
from lightning_fscreen.statistics.padding import Tokens

# Values transformed at a time on CPUs: in float32 they stay in the cache until their mean is taken.
_CHUNK = 2**19


@dataclass(frozen=True)
class Activation:
    """An element-wise function.

    Attributes:
        function: returns a new tensor; its argument stays as it is.
        in_place: the same, but overwrites its argument, which spares memory traffic; None if torch has no such form.
    """

    function: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor] | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """The function of `values`, in a tensor of its own."""
        return self.function(values)

    def consume(self, values: Tensor) -> Tensor:
        """The function of `values`, which may hold anything afterwards."""
        return (self.in_place or self.function)(values)


def feature_dimension(activation: Tensor, module: nn.Module) -> int:
    """The dimension of the features: the last of linear layers, else the second; of an unbatched activation the first.

    Args:
        activation: input or output of the layer.
        module: the layer.
    """
    if isinstance(module, nn.Linear) or is_transposed_linear(module):
        return activation.ndim - 1
    return 0 if isinstance(module, _ConvNd) and activation.ndim == len(module.kernel_size) + 1 else 1


class PositionMeans:
    """Takes means over positions; on CPUs piece by piece, in memory that is used again from call to call."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, device="cpu")

    def __call__(
        self,
        activation: Tensor,
        module: nn.Module,
        function: Activation | None = None,
        square: bool = False,
        tokens: Tokens | None = None,
    ) -> Tensor:
        """Mean over all positions: one value per instance and channel, (N, channels), detached.

        Linear layers have their features last, the others second; an unbatched activation is one instance.

        Args:
            activation: input or output of the layer; stays as it is.
            module: the layer.
            function: an element-wise function to apply first.
            square: whether to square then.
            tokens: those that count, if the activation has such; None for all positions.
        """
        activation = activation.detach()
        dimension = feature_dimension(activation, module)
        if dimension == 0:  # one instance
            activation, dimension = activation.unsqueeze(0), 1
        positions = tuple(place for place in range(1, activation.ndim) if place != dimension)
        dtype = torch.promote_types(activation.dtype, torch.float32)
        if tokens is not None and (padded := tokens.dimension(activation, positions)) is not None:
            values = (activation if function is None else function(activation)).to(dtype)
            return tokens.mean(values.square() if square else values, positions, padded)
        if function is None and not square:
            return activation.mean(positions, dtype=dtype) if positions else activation
        if not positions:
            return _transform(activation.to(dtype), activation, function, square)
        if activation.device.type != "cpu":  # whose kernels convert as they read
            values = activation if function is None else function(activation)
            return (values.to(dtype).square() if square else values).mean(positions, dtype=dtype)
        parts = activation.split(max(_CHUNK // max(activation[:1].numel(), 1), 1))
        return torch.cat(
            [_transform(self._convert(part, dtype), part, function, square).mean(positions) for part in parts]
        )

    def _convert(self, part: Tensor, dtype: torch.dtype) -> Tensor:
        """The part itself if it has this dtype, or a copy in the same layout, which lives until the next one."""
        dense = part.is_contiguous() or (part.ndim == 4 and part.is_contiguous(memory_format=torch.channels_last))
        if part.dtype == dtype or not dense:
            return part.to(dtype)
        if self._memory.dtype != dtype or len(self._memory) < part.numel():
            self._memory = torch.empty(part.numel(), dtype=dtype, device=part.device)
        return self._memory.as_strided(part.shape, part.stride()).copy_(part)


def _transform(values: Tensor, read: Tensor, function: Activation | None, square: bool) -> Tensor:
    """Apply the function, and square; in place where `values` is no longer the tensor that was read."""
    if function is not None:
        values = function(values) if values is read else function.consume(values)
    if square:
        values = values.square() if values is read else values.square_()
    return values
