"""`bias="ridge"`: what is pruned is predicted from what stays, inside the weights that read both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_fscreen.candidates.magnitude import Reader
from lightning_fscreen.statistics.second_moments import SecondMoments


class Regression:
    """The weights that multiply some units, and what they multiply.

    Args:
        readers: the weights, each used once in a pass.
        apart: (units,) int64, units of several inputs that are no copies of each other: heads.
    """

    def __init__(self, readers: Sequence[Reader], apart: Tensor) -> None:
        self._readers = [(reader, _copies(reader.labels, apart)) for reader in readers]
        self.moments = SecondMoments({reader.weight: places for reader, places in self._readers})

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that `apply` changes."""
        return [reader.weight for reader, _ in self._readers]

    @torch.no_grad()
    def apply(self, gone: Tensor) -> None:
        """Let what stays do the work of what goes, as nearly as it can.

        Args:
            gone: (units,) int64, units that are zero from now on.
        """
        for reader, places in self._readers:
            pruned, found = torch.isin(reader.labels[places[0]], gone), self.moments.of(reader.weight)
            if found is not None and bool(pruned.any()) and not bool(pruned.all()):
                moments, instances = found
                _fold(reader.weight, reader.dim, places, pruned, ridge(moments.cpu(), pruned, instances))


def ridge(moments: Tensor, pruned: Tensor, instances: int) -> Tensor:
    """Coefficients B that predict some features from the others: x_pruned ≈ B x_kept.

    B = M_pk (M_kk + λ·I)⁻¹, with M the second moments, scaled so that each feature has 1, and λ = ρ / (1 − ρ). The
    shrinkage ρ is the one that estimates a covariance from so many instances best (OAS, Chen et al. 2010, equation 23);
    the fewer there are, the less is predicted. Without an intercept: zeros that a convolution pads with stay zeros.

    Args:
        moments: (features, features), Σ x xᵀ.
        pruned: (features,) bool.
        instances: number of independent instances.

    Returns:
        (pruned, kept) float64.
    """
    moments = moments.double()
    scale = moments.diagonal().sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    scaled = inverse[:, None] * moments * inverse
    features = max(int((scale > 0).sum()), 1)
    squares = float(scaled.square().sum())
    excess = (instances + 1 - 2 / features) * (squares - features)
    shrinkage = min(((1 - 2 / features) * squares + features**2) / excess, 1.0) if excess > 0 else 1.0
    kept = ~pruned
    among = (1 - shrinkage) * scaled[kept][:, kept]
    among.diagonal().add_(max(shrinkage, torch.finfo(torch.float32).eps))
    predicted = torch.linalg.solve(among, (1 - shrinkage) * scaled[kept][:, pruned]).mT
    coefficients: Tensor = scale[pruned][:, None] * predicted * inverse[kept]
    return coefficients


def _fold(weight: Tensor, dim: int, places: Tensor, pruned: Tensor, coefficients: Tensor) -> None:
    """W_kept ← W_kept + W_pruned B, W_pruned ← 0, for every copy of the features."""
    values = weight.detach().cpu().movedim(dim, -1).double()  # some devices have no float64
    for copy in places:
        gone, kept = copy[pruned], copy[~pruned]
        values[..., kept] += values[..., gone] @ coefficients
        values[..., gone] = 0
    weight.copy_(values.movedim(-1, dim))


def _copies(labels: Tensor, apart: Tensor) -> Tensor:
    """(copies, features): inputs of equal labels are copies of one feature, if all have as many."""
    numbers, counts = labels.unique(return_counts=True)
    if int(counts.min()) == int(counts.max()) and not bool(torch.isin(numbers, apart).any()):
        return labels.argsort(stable=True).view(len(numbers), -1).mT.contiguous()
    return torch.arange(len(labels))[None]
