"""A buffer of activations: hooks copy into it, and several steps are summed at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Summing many small batches one by one costs more in overhead than in arithmetic.
_BYTES = 8 * 2**20


class ActivationBuffer:
    """Activations of the running step, behind those of the steps that wait to be summed.

    Columns are the features of all probes, one after another; rows are instances. What is copied in is safe from what
    later layers do to their inputs in place.

    Args:
        sizes: number of features of every probe.
        device: where to keep them.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        self.columns = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self._rows = torch.empty(0, ends[-1], dtype=torch.float32, device=device)  # float64 once such values come
        self._labels: list[Tensor] = []  # of the steps that wait
        self._waiting = 0  # rows of theirs
        self.rows = 0  # of the running step
        self.runs: dict[int, int] = {}  # probe → times its layer ran in the running step
        self.uneven: dict[int, int] = {}  # probe → number of instances, where it differs from `rows`

    def has_room(self, rows: int) -> bool:
        """Whether a step of so many rows fits behind those that wait."""
        return not self._waiting or self._waiting + rows <= len(self._rows)

    def put(self, index: int, values: Tensor) -> None:
        """Take a probe's activations (N, features); those of a layer that runs several times are added up."""
        if not self.runs:
            self.rows = len(values)
            self._reserve(self._waiting + self.rows)
        if len(values) != self.rows:
            self.uneven[index] = len(values)
            return
        if values.dtype == torch.float64 != self._rows.dtype:
            self._rows = self._rows.double()
        place = self.running()[:, self.columns[index]]
        if index in self.runs:
            place += values
        else:
            place.copy_(values)
        self.runs[index] = self.runs.get(index, 0) + 1

    def running(self) -> Tensor:
        """Rows of the running step."""
        return self._rows[self._waiting : self._waiting + self.rows]

    def average_runs(self) -> None:
        """Turn the sums over several runs of a layer into means."""
        for index, runs in self.runs.items():
            if runs > 1:
                self.running()[:, self.columns[index]] /= runs

    def discard(self) -> None:
        """Forget the running step."""
        self.runs.clear()
        self.uneven.clear()
        self.rows = 0

    def keep(self, labels: Tensor) -> None:
        """Let the running step wait; nothing is running then."""
        self._labels.append(labels.detach().clone())
        self._waiting += self.rows
        self.discard()

    def take(self) -> tuple[Tensor, list[Tensor]]:
        """All rows that wait, valid until the next `put`, and their labels by step; none wait then."""
        rows, labels = self._rows[: self._waiting], self._labels
        self._waiting, self._labels = 0, []
        return rows, labels

    def waiting(self) -> tuple[Tensor, list[Tensor]]:
        """Copies of the rows that wait, and of their labels by step."""
        return self._rows[: self._waiting].clone(), list(self._labels)

    def restore(self, rows: Tensor, labels: list[Tensor]) -> None:
        """Let these rows wait, and no others."""
        self._rows = self._rows.to(rows.dtype)
        self._reserve(len(rows))
        self._rows[: len(rows)] = rows
        self._waiting, self._labels = len(rows), [batch.to(self._rows.device) for batch in labels]

    def _reserve(self, rows: int) -> None:
        if rows > len(self._rows):
            width = self._rows.shape[1]
            self._rows = self._rows.new_empty(max(rows, _BYTES // (self._rows.itemsize * width)), width)
