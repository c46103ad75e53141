"""Which entries of which parameters belong to a candidate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Members:
    """The parameters of one layer whose entries belong to its candidates.

    Attributes:
        weight: the parameter that is masked.
        others: (candidates,) each, or of the weight's shape where each of its entries is a candidate: the parameters
            that belong to the candidates, too.
        zeroed: whether the others are zeroed with the weight.
        dim: the dimension of the weight along which the candidates lie: each has one row of a matrix, for instance. By
            default every entry is a candidate.
        size: how many neighbours in that dimension belong to each (the columns that read a head).
    """

    weight: nn.Parameter
    others: tuple[nn.Parameter, ...] = ()
    zeroed: bool = False
    dim: int | None = None
    size: int = 1

    def of(self, weight: nn.Parameter) -> Members:
        """The same with another weight, of another size perhaps."""
        return replace(self, weight=weight)

    @property
    def shape(self) -> torch.Size:
        """Shape of a mask over the candidates."""
        return self.weight.shape if self.dim is None else torch.Size([self.weight.shape[self.dim] // self.size])

    def cut(self, values: Tensor, cut: Callable[[Tensor, Sequence[int]], Tensor]) -> Tensor:
        """The part that is left of values over all candidates.

        Args:
            values: of the shape of a mask.
            cut: cuts a tensor as the weight is cut along these of its dimensions.
        """
        if self.dim is None:
            return cut(values, range(values.ndim))
        return cut(values.repeat_interleave(self.size), (self.dim,))[:: self.size]

    def spread(self, values: Tensor) -> Tensor:
        """Values of the candidates at their entries of the weight: broadcastable to its shape."""
        if self.dim is None:
            return values
        values = values.repeat_interleave(self.size) if self.size > 1 else values
        return values.view([-1 if dim == self.dim else 1 for dim in range(self.weight.ndim)])

    def total(self, values: Tensor) -> Tensor:
        """Sum, over its entries, for each candidate.

        Args:
            values: of the weight's shape.
        """
        if self.dim is None:
            return values
        rest = [dim for dim in range(self.weight.ndim) if dim != self.dim]
        total = values.sum(rest) if rest else values
        return total.view(-1, self.size).sum(1) if self.size > 1 else total

    def norm(self, values: Tensor) -> Tensor:
        """√(Σ v²), over its entries, for each candidate.

        Args:
            values: of the weight's shape.
        """
        return values.abs() if self.dim is None else self.total(values.square()).sqrt()

    def nonzero(self) -> Tensor:
        """Whether a candidate has entries in the weight that are not zero."""
        return self.total(self.weight.detach() != 0) > 0

    def masks(self, kept: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """What is zeroed by a mask: each parameter, with the mask broadcastable to its shape."""
        return [(self.weight, self.spread(kept)), *((other, kept) for other in self.others if self.zeroed)]

    def affected(self, candidates: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """All entries of some candidates: each parameter, with a mask of its shape."""
        entries = self.spread(candidates).expand(self.weight.shape)
        return [(self.weight, entries), *((other, candidates) for other in self.others)]
