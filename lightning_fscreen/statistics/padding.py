"""Which tokens of a batch's sequences count: those that its attention mask keeps, and not the padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_KEY = "attention_mask"


class Tokens:
    """Which tokens of every instance count.

    Args:
        mask: (N, T) boolean or integers, nonzero where a token counts.
    """

    def __init__(self, mask: Tensor) -> None:
        self._ignored = mask == 0
        self._counts = (~self._ignored).sum(1).clamp(min=1)

    def dimension(self, activation: Tensor, positions: Sequence[int]) -> int | None:
        """That of the tokens among the positions of an activation; None if it has none, or it is not clear which."""
        instances, length = self._ignored.shape
        found = [each for each in positions if activation.shape[each] == length]
        return found[0] if len(activation) == instances and len(found) == 1 else None

    def counted(self, values: Tensor) -> Tensor:
        """(tokens that count, features) of values (N, T, features); all of them where it is not clear which count."""
        positions = range(1, values.ndim - 1)
        return values[~self._ignored] if self.dimension(values, positions) == 1 and values.ndim == 3 else values

    def mean(self, values: Tensor, positions: Sequence[int], dimension: int) -> Tensor:
        """Mean over the positions of the tokens that count; zero for an instance without any.

        Args:
            values: whatever stands at the others has no influence, NaN included.
            positions: dimensions to average over.
            dimension: that of the tokens.
        """
        shape = [1] * values.ndim
        shape[0], shape[dimension] = self._ignored.shape
        others = [values.shape[each] for each in positions if each != dimension]
        total = values.masked_fill(self._ignored.view(shape), 0).sum(tuple(positions))
        counts = self._counts.view(-1, *[1] * (total.ndim - 1))
        for other in others:
            counts = counts * other
        return total / counts


def find_tokens(batch: Any) -> Tokens | None:
    """The tokens that count by an entry `attention_mask` of the batch, (N, T) booleans or integers; None without one.

    It is looked for in mappings and objects, also where such a one is an item of the batch. Masks of floating point are
    added to scores by some and multiplied by others, so that they say nothing here.
    """
    parts = [batch, *batch] if isinstance(batch, Sequence) and not isinstance(batch, str | Tensor) else [batch]
    for part in parts:
        mask = part.get(_KEY) if isinstance(part, Mapping) else getattr(part, _KEY, None)
        if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point():
            return Tokens(mask)
    return None
