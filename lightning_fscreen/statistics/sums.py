"""Class sums of the features of several layers, of which any may have run in a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fscreen.functional import ClassSums
from lightning_fscreen.functional.precision import exact_products
from lightning_fscreen.statistics.connections import ConnectionSums
from lightning_fscreen.statistics.moments import ClassMoments, accumulate_moments_, empty_moments

_NONE = 2**62  # later than any batch
# Values summed at a time: on CPUs so few that they and their powers stay in the cache, on accelerators so many that the
# number of kernels does not matter, in memory that does not matter either.
_CHUNK, _LARGE_CHUNK = 2**19, 2**23
_ROWS = 2**12  # of which an accelerator sums products in float32
_FIRST = 2**8  # rows whose means are near enough to those of all


class FeatureSums:
    """Sums over the batches of an epoch, with all layers' features side by side.

    Args:
        columns: for each layer, the columns of its features.
        num_classes: C.
        device: where to keep the sums.
        connections: for layers whose connections get sums of their own, by index, those sums.
    """

    def __init__(
        self,
        columns: Sequence[slice],
        num_classes: int,
        device: torch.device,
        connections: Mapping[int, ConnectionSums],
    ) -> None:
        self.moments = empty_moments(num_classes, columns[-1].stop if columns else 0, device, by_feature=True)
        self.connections = dict(connections)
        self._columns = list(columns)
        self._num_classes = num_classes
        self._seen = [False] * len(columns)
        self._scratch: Tensor | None = None
        self._first_bad = torch.full((), _NONE, dtype=torch.int64, device=device)
        for sums in connections.values():
            sums.reset()

    @property
    def first_bad(self) -> int | None:
        """The first batch with NaN or inf; None if there was none."""
        first = int(self._first_bad)
        return first if first < _NONE else None

    def add(
        self,
        ran: Sequence[int],
        features: Tensor,
        labels: Sequence[Tensor],
        first: int,
        weights: Mapping[int, Tensor],
    ) -> None:
        """Add the features of the layers that ran.

        Args:
            ran: indices of these layers, in order.
            features: (N, their features), which may be overwritten.
            labels: of one batch after another, N in all.
            first: number of the first of these batches.
            weights: for layers with sums over connections, the weights that the features were multiplied with.
        """
        members = torch.cat(list(labels))
        columns: slice | Tensor = slice(None)
        if len(ran) < len(self._columns):
            columns = self._places(ran)
        self._set_origins(ran, columns, features)
        if isinstance(columns, slice) and not self.connections:
            self._accumulate(self.moments, features, members)
        else:
            shift = self.moments.shift[columns]
            batch = empty_moments(self._num_classes, len(shift), shift.device)._replace(shift=shift)
            self._accumulate(batch, features, members)
            self.moments.add_(columns, batch)
            self._add_connections(ran, batch.class_sums, weights)
        # An accelerator is not waited for: there all rows are looked at.
        squares = self.moments.squares
        if squares.device.type != "cpu" or not bool(torch.isfinite(squares.sum())):
            self._note_bad_rows(features, labels, first)

    def state_dict(self) -> dict[str, Any]:
        """All sums, as tensors and primitives."""
        return {"moments": self.moments._asdict(), "seen": list(self._seen), "first_bad": self._first_bad}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        for own, loaded in zip(self.moments, ClassMoments(**state["moments"]), strict=True):
            own.copy_(loaded)
        self._seen = list(state["seen"])
        self._first_bad.copy_(state["first_bad"])

    def _set_origins(self, ran: Sequence[int], columns: slice | Tensor, features: Tensor) -> None:
        """Measure the features of layers that run for the first time from near their means."""
        unseen = [index for index in ran if not self._seen[index]]
        if not unseen:
            return
        shift = self.moments.shift
        if len(unseen) == len(self._columns):
            shift.copy_(_origin(features))
        else:
            origin, new = shift.clone(), self._places(unseen)
            origin[columns] = _origin(features).to(shift)
            shift[new] = origin[new]
        for index in unseen:
            self._seen[index] = True

    def _places(self, layers: Sequence[int]) -> Tensor:
        """Indices of the columns of some layers."""
        places = [torch.arange(self._columns[index].start, self._columns[index].stop) for index in layers]
        return _sent(torch.cat(places), self.moments.shift.device)

    def _accumulate(self, moments: ClassMoments, features: Tensor, labels: Tensor) -> None:
        """Add rows, which may be overwritten, to sums with one count a class or one a class and feature.

        Offsets and powers of float32 activations are float32: as exact as the activations. So are their sums over few
        rows, before they join the float64 totals: they lose nothing, and take half the time on CPUs and far less on
        accelerators, of which many have hardly any float64 units.
        """
        on_cpu = features.device.type == "cpu"
        single = features.dtype == torch.float32 and not self.connections
        chunk = (_CHUNK if on_cpu else _LARGE_CHUNK) // features.shape[1]
        if not on_cpu and labels.is_floating_point():
            chunk = min(chunk, _ROWS)
        chunk = max(min(chunk, len(features)), 1)
        shift = moments.shift.float() if single else moments.shift
        if not single and (self._scratch is None or self._scratch.shape != (chunk, features.shape[1])):
            self._scratch = torch.empty(chunk, features.shape[1], dtype=torch.float64, device=features.device)
        with exact_products(features.device.type):
            for rows, members in zip(features.split(chunk), labels.split(chunk), strict=True):
                # Converting first is several times faster than a subtraction that promotes.
                offsets = rows if single or self._scratch is None else self._scratch[: len(rows)].copy_(rows)
                accumulate_moments_(moments, offsets.sub_(shift), members)

    def _add_connections(self, ran: Sequence[int], batch: ClassSums, weights: Mapping[int, Tensor]) -> None:
        sizes = [self._columns[index].stop - self._columns[index].start for index in ran]
        parts = (part.split(sizes, dim=-1) for part in (batch.shift, batch.sums, batch.squares))
        for index, shift, sums, squares in zip(ran, *parts, strict=True):
            if index in self.connections:
                self.connections[index].update(ClassSums(shift, batch.counts, sums, squares), weights[index])

    def _note_bad_rows(self, features: Tensor, labels: Sequence[Tensor], first: int) -> None:
        """Remember the first batch with a NaN or inf."""
        lengths = torch.tensor([len(batch) for batch in labels])
        batches = _sent(torch.arange(first, first + len(labels)).repeat_interleave(lengths), features.device)
        # A float64 sum is finite if all its float32 terms are.
        bad = torch.where(_is_finite(features.sum(1, dtype=torch.float64)), _NONE, batches)
        self._first_bad = torch.minimum(self._first_bad, bad.amin())


def _origin(features: Tensor) -> Tensor:
    """From where to measure: near the means of these rows (N, p), and exactly at features that are constant."""
    features = features[:_FIRST]
    first = features[0]
    mean = first + (features - first).mean(0)
    return torch.where(_is_finite(mean), mean, torch.where(_is_finite(first), first, 0))


def _sent(indices: Tensor, device: torch.device) -> Tensor:
    """Indices on a device; the host does not wait until all that the device has to do before is done."""
    return indices.to(device, non_blocking=True)


def _is_finite(values: Tensor) -> Tensor:
    """As torch.isfinite, which takes twice as many kernels."""
    return values - values == 0
