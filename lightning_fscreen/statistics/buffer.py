"""A buffer of activations: several steps are gathered, and summed at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Summing many small batches one by one costs more in overhead than in arithmetic, on accelerators all the more.
_BYTES, _BYTES_ON_ACCELERATORS = 8 * 2**20, 32 * 2**20


class ActivationBuffer:
    """Activations of the running step, and rows of the steps that wait to be summed.

    Columns are the features of all probes, one after another; rows are instances.

    Args:
        sizes: number of features of every probe.
        device: where to keep them.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        self.columns = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self._rows = torch.empty(0, sum(sizes), dtype=torch.float32, device=device)  # float64 once such values come
        self._labels: list[Tensor] = []  # of the steps that wait
        self._waiting = 0  # rows of theirs
        self._running: dict[int, list[Tensor]] = {}  # probe → activations (N, features) of each run of its layer

    @property
    def device(self) -> torch.device:
        """Where the activations are kept."""
        return self._rows.device

    def put(self, index: int, values: Tensor) -> None:
        """Take a probe's activations (N, features), which must not change until the step is kept or discarded."""
        self._running.setdefault(index, []).append(values)

    @property
    def ran(self) -> list[int]:
        """Probes whose layers ran in the running step."""
        return sorted(self._running)

    def wrong_rows(self, rows: int) -> dict[int, int]:
        """Probes with another number of instances, and that number."""
        numbers = {index: [len(values) for values in runs] for index, runs in sorted(self._running.items())}
        return {index: next(n for n in own if n != rows) for index, own in numbers.items() if set(own) != {rows}}

    def drop(self, index: int) -> None:
        """Forget a probe's activations of the running step."""
        del self._running[index]

    def features(self) -> Tensor:
        """Activations of the running step (N, features of the probes that ran); means over several runs of a layer."""
        return torch.cat(self._means(), dim=1)

    def discard(self) -> None:
        """Forget the running step."""
        self._running.clear()

    def clear(self) -> None:
        """Forget everything; the memory is used again."""
        self._waiting, self._labels = 0, []
        self.discard()

    def has_room(self, rows: int) -> bool:
        """Whether so many rows fit behind those that wait."""
        return not self._waiting or self._waiting + rows <= len(self._rows)

    def keep(self, labels: Tensor) -> None:
        """Let the running step, in which all layers ran, wait; nothing is running then."""
        means = self._means()
        dtype = torch.float64 if any(values.dtype == torch.float64 for values in means) else torch.float32
        if dtype == torch.float64 and self._rows.dtype != dtype:
            self._rows = self._rows.double()
        end = self._waiting + len(labels)
        self._reserve(end)
        torch.cat([values.to(self._rows) for values in means], dim=1, out=self._rows[self._waiting : end])
        self._labels.append(labels.detach().clone())
        self._waiting = end
        self.discard()

    def take(self) -> tuple[Tensor, list[Tensor]]:
        """All rows that wait, valid until the next `keep`, and their labels by step; none wait then."""
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

    def _means(self) -> list[Tensor]:
        ordered = [runs for _, runs in sorted(self._running.items())]
        return [runs[0] if len(runs) == 1 else torch.stack(runs).mean(0) for runs in ordered]

    def _reserve(self, rows: int) -> None:
        """Make room for so many rows; those that wait stay."""
        if rows > len(self._rows):
            width = self._rows.shape[1]
            size = _BYTES if self._rows.device.type == "cpu" else _BYTES_ON_ACCELERATORS
            larger = self._rows.new_empty(max(rows, size // (self._rows.itemsize * width)), width)
            larger[: self._waiting] = self._rows[: self._waiting]
            self._rows = larger
