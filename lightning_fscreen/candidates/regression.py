"""`bias="ridge"`: what is pruned is predicted from what stays, inside the weights that read both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_fscreen.candidates.magnitude import Reader
from lightning_fscreen.candidates.reconstruction import Reading, elimination_errors
from lightning_fscreen.statistics.second_moments import SecondMoments


class Regression:
    """The weights that multiply some units, and what they multiply.

    Those that are used several times in a pass are left alone, because their inputs may differ, and so are buffers and
    complex numbers.

    Args:
        readers: the weights.
        apart: (units,) int64, units of several inputs that are no copies of each other: heads.
    """

    def __init__(self, readers: Sequence[Reader], apart: Tensor) -> None:
        can = [
            reader.uses == 1 and isinstance(reader.weight, nn.Parameter) and not reader.weight.is_complex()
            for reader in readers
        ]
        own = [reader for reader, it_can in zip(readers, can, strict=True) if it_can]
        self._readers = [(reader, _copies(reader.labels, apart)) for reader in own]
        self._others = [reader.labels for reader, it_can in zip(readers, can, strict=True) if not it_can]
        self.moments = SecondMoments({reader.weight: places for reader, places in self._readers})

    @property
    def parameters(self) -> list[Tensor]:
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

    @torch.no_grad()
    def errors(self, units: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each unit's absence adds to the errors of all that read it, see `elimination_errors`.

        Args:
            units: layer → (units,) int64, negative for those that stay.

        Returns:
            layer → (units,) float64; not a number where that is not known.
        """
        prunable = torch.cat(list(units.values())).unique()
        prunable = prunable[prunable >= 0]
        found, unknown = torch.full((len(prunable),), torch.nan, dtype=torch.float64), list(self._others)
        readings = []
        for reader, places in self._readers:
            labels = reader.labels[places[0]]
            counts = labels[torch.isin(labels, prunable)].unique(return_counts=True)[1]
            if len(counts) == 0:
                continue
            moments = self.moments.of(reader.weight)
            if moments is None or int(counts.min()) != int(counts.max()):
                unknown.append(labels)
                continue
            shrunk, scale = _scaled(moments[0].cpu(), moments[1])
            weight = reader.weight.detach().cpu().movedim(reader.dim, -1)[..., places].double() * scale
            readings.append(Reading(shrunk, (flat := weight.flatten(0, -2)).mT @ flat, labels))
        for own, members in _together(prunable, readings):
            found[torch.searchsorted(prunable, own)] = elimination_errors(own, members)
        for labels in unknown:
            found[torch.isin(prunable, labels)] = torch.nan
        return {
            name: torch.where(own < 0, 0.0, found[torch.searchsorted(prunable, own.clamp(min=int(prunable[0])))])
            for name, own in units.items()
        }


def _together(units: Tensor, readings: Sequence[Reading]) -> list[tuple[Tensor, list[Reading]]]:
    """Units that are read together, directly or through others, and the readings of each such set."""
    sets: list[tuple[Tensor, list[Reading]]] = []
    for reading in readings:
        own, members = units[torch.isin(units, reading.labels)], [reading]
        apart = []
        for others in sets:
            if bool(torch.isin(others[0], own).any()):
                own, members = torch.cat([own, others[0]]).unique(), [*others[1], *members]
            else:
                apart.append(others)
        sets = [*apart, (own, members)]
    return sets


def _scaled(moments: Tensor, instances: int) -> tuple[Tensor, Tensor]:
    """Second moments of features that are scaled so that each has 1, shrunk towards independence; and their scales.

    One more instance is thought to be there, in which all features are independent and as large as they are on average:
    what was never active in a few instances may be so in others. The shrinkage ρ, (1 − ρ) M + ρ I, is the one that
    estimates a covariance from so many instances best (OAS, Chen et al. 2010, equation 23).

    Args:
        moments: (features, features), Σ x xᵀ.
        instances: number of independent instances.
    """
    moments = moments.to(torch.float64, copy=True)
    moments.diagonal().add_(moments.diagonal().mean() / instances)
    scale = moments.diagonal().sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    scaled = inverse[:, None] * moments * inverse
    features = max(int((scale > 0).sum()), 1)
    squares = float(scaled.square().sum())
    excess = (instances + 1 - 2 / features) * (squares - features)
    shrinkage = min(((1 - 2 / features) * squares + features**2) / excess, 1.0) if excess > 0 else 1.0
    shrunk = (1 - shrinkage) * scaled
    shrunk.diagonal().add_(max(shrinkage, torch.finfo(torch.float32).eps))
    return shrunk, scale


def ridge(moments: Tensor, pruned: Tensor, instances: int) -> Tensor:
    """Coefficients B that predict some features from the others: x_pruned ≈ B x_kept.

    B = M_pk (M_kk + λ·I)⁻¹, with M the second moments, scaled so that each feature has 1, and λ = ρ / (1 − ρ), ρ the
    shrinkage of `_scaled`: the fewer instances there are, the less is predicted. Without an intercept: zeros that a
    convolution pads with stay zeros.

    Args:
        moments: (features, features), Σ x xᵀ.
        pruned: (features,) bool.
        instances: number of independent instances.

    Returns:
        (pruned, kept) float64.
    """
    (shrunk, scale), kept = _scaled(moments, instances), ~pruned
    predicted = torch.linalg.solve(shrunk[kept][:, kept], shrunk[kept][:, pruned]).mT
    coefficients: Tensor = scale[pruned][:, None] * predicted * torch.where(scale > 0, 1 / scale, 0.0)[kept]
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
    if 1 < int(counts.min()) == int(counts.max()) and not bool(torch.isin(numbers, apart).any()):
        return labels.argsort(stable=True).view(len(numbers), -1).mT.contiguous()
    return torch.arange(len(labels))[None]
