"""Forward hooks that turn activations into class sums, open only while a training step runs its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from lightning_fscreen.candidates import PrunableWeight, num_inputs
from lightning_fscreen.connections import ConnectionSums
from lightning_fscreen.functional import ClassSums, accumulate_offsets_, check_labels, f_statistic_compute


@dataclass(frozen=True)
class Probe:
    """One place where activations are read: the input or the output of a layer."""

    name: str
    module: nn.Module
    side: str = "input"  # or "output"

    @property
    def num_features(self) -> int:
        """Channels (features) there."""
        return num_inputs(self.module)


def reduce_positions(activation: Tensor, module: nn.Module) -> Tensor:
    """Mean over all positions: one value per instance and channel, (N, channels), detached.

    Linear layers have their features last, the others second; an unbatched activation is one instance.
    """
    activation = activation.detach()
    if isinstance(module, nn.Linear):
        if activation.ndim == 2:
            return activation
        if activation.ndim == 1:
            return activation.unsqueeze(0)
        positions = activation.flatten(1, -2)
        return positions.mean(1, dtype=_mean_dtype(activation))
    if isinstance(module, _ConvNd) and activation.ndim == len(module.kernel_size) + 1:
        activation = activation.unsqueeze(0)
    if activation.ndim == 2:
        return activation
    return activation.flatten(2).mean(2, dtype=_mean_dtype(activation))


def _mean_dtype(activation: Tensor) -> torch.dtype:
    return torch.promote_types(activation.dtype, torch.float32)


@dataclass(frozen=True)
class FeatureStatistics:
    """What an epoch's activations said about the features at one probe.

    Attributes:
        f: (features,) F-statistics; for exact connections, of the weight's shape.
        mean: (features,) mean activation.
        mean_square: (features,) mean squared activation.
    """

    f: Tensor
    mean: Tensor
    mean_square: Tensor


class ActivationCollector:
    """Online class sums of the activations at some probes.

    `activations` are gathered while `active` is true, as the model runs; `update(labels)` then adds them, as one
    batch, to the sums. A layer that runs several times in a step counts with the mean of its runs.

    Args:
        probes: where to read.
        num_classes: C.
        exact: layers whose connections get sums of their own (their inputs must be among the probes).
    """

    def __init__(self, probes: Sequence[Probe], num_classes: int, exact: Iterable[PrunableWeight] = ()) -> None:
        self.active = False
        self.num_classes = num_classes
        self._probes = list(probes)
        self._sizes = [probe.num_features for probe in self._probes]
        self._starts = [sum(self._sizes[:index]) for index in range(len(self._sizes))]
        self._exact = {candidate.name: ConnectionSums(candidate, num_classes) for candidate in exact}
        self._columns = [slice(start, start + size) for start, size in zip(self._starts, self._sizes, strict=True)]
        self._buffer: Tensor | None = None  # (N, features) float64, this step's activations; kept from step to step
        self._runs: dict[int, int] = {}  # probe → times its layer ran in this step
        self._uneven: dict[int, int] = {}  # probe → number of instances, where it differs from the others'
        self._weights: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self.reset()

    def attach(self) -> None:
        """Register the hooks."""
        for index, probe in enumerate(self._probes):
            if probe.side == "input":
                hook = probe.module.register_forward_pre_hook(self._input_hook(index), with_kwargs=True)
            else:
                hook = probe.module.register_forward_hook(self._output_hook(index))
            self._handles.append(hook)

    def remove(self) -> None:
        """Take the hooks away again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def reset(self) -> None:
        """Forget all sums."""
        device = next((p.device for probe in self._probes for p in probe.module.parameters()), torch.device("cpu"))
        total = sum(self._sizes)
        zeros = torch.zeros(self.num_classes + 2, total, dtype=torch.float64, device=device)
        self._sums = ClassSums(zeros[0], torch.zeros_like(zeros[2:]), zeros[2:], zeros[1])
        self._seen = [False] * len(self._probes)
        self._batches = 0
        self._finite_batches = torch.zeros((), dtype=torch.int64, device=device)
        for sums in self._exact.values():
            sums.reset()
        self.discard()

    def discard(self) -> None:
        """Forget the activations gathered since the last update."""
        self._runs.clear()
        self._uneven.clear()
        self._weights.clear()

    def update(self, labels: Tensor) -> None:
        """Add the activations gathered since the last update, whose instances have these labels.

        Args:
            labels: (N,) class indices or (N, C) class weights.

        Raises:
            ValueError: bad labels, or a layer that ran with another number of instances; nothing is added then.
        """
        if self._buffer is None or not self._runs:
            return
        try:
            if labels.device.type == "cpu" or self._batches == 0:
                check_labels(labels, self.num_classes)
            self._check_rows(len(self._buffer), len(labels))
            if len(labels):
                self._add(sorted(self._runs), self._buffer, labels)
            # Sums that have met a NaN or inf stay so: the count of finite batches is the number of the first bad one.
            self._finite_batches += torch.isfinite(self._sums.squares.sum())
            self._batches += 1
        finally:
            self.discard()

    def statistics(self, merge: Callable[[ClassSums], ClassSums] = lambda sums: sums) -> dict[str, FeatureStatistics]:
        """F-statistics and moments by probe name.

        Args:
            merge: merges the sums with those of other processes.

        Raises:
            ValueError: NaN or inf activations (names the layer and the batch), a layer that never ran, labels outside
                the classes, fewer than two classes.
        """
        merged = merge(self._sums)
        self._check_finite(merged.squares)
        for probe, start in zip(self._probes, self._starts, strict=True):
            if not bool(merged.counts[:, start].any()):
                raise ValueError(
                    f"layer {probe.name!r} never ran, so there is no F-statistic for it; leave it out with "
                    f"exclude={probe.name!r}"
                )
        counts = merged.counts.sum(0)
        offset = merged.sums.sum(0) / counts
        f = f_statistic_compute(merged)
        mean = merged.shift + offset
        mean_square = merged.squares / counts + 2 * merged.shift * offset + merged.shift**2
        statistics = {}
        for probe, start, size in zip(self._probes, self._starts, self._sizes, strict=True):
            part = slice(start, start + size)
            probe_f = f[part]
            if probe.name in self._exact:
                connections = self._exact[probe.name]
                probe_f = f_statistic_compute(merge(connections.class_sums())).view(connections.shift.shape)
            statistics[probe.name] = FeatureStatistics(probe_f, mean[part], mean_square[part])
        return statistics

    def state_dict(self) -> dict[str, Any]:
        """All sums, as tensors and primitives."""
        return {
            "num_classes": self.num_classes,
            "sums": self._sums._asdict(),
            "exact": {name: sums.class_sums()._asdict() for name, sums in self._exact.items()},
            "seen": list(self._seen),
            "batches": self._batches,
            "finite_batches": self._finite_batches,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        for own, loaded in zip(self._sums, ClassSums(**state["sums"]), strict=True):
            own.copy_(loaded)
        for name, sums in self._exact.items():
            sums.load(ClassSums(**state["exact"][name]))
        self._seen = list(state["seen"])
        self._batches = state["batches"]
        self._finite_batches.copy_(state["finite_batches"])

    def _input_hook(self, index: int) -> Callable[..., None]:
        probe = self._probes[index]

        def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.active:
                self._gather(index, reduce_positions(args[0] if args else kwargs["input"], module))
                if probe.name in self._exact:
                    self._weights[index] = probe.module.get_parameter("weight").detach().clone()

        return gather

    def _output_hook(self, index: int) -> Callable[..., None]:
        def gather(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self.active:
                self._gather(index, reduce_positions(output, module))

        return gather

    def _gather(self, index: int, values: Tensor) -> None:
        """Copy a layer's activations (N, features) to its place; whatever happens to them later does not matter."""
        if not self._runs and (self._buffer is None or len(self._buffer) != len(values)):
            self._buffer = self._sums.squares.new_empty(len(values), len(self._sums.squares))
        assert self._buffer is not None
        if len(values) != len(self._buffer):
            self._uneven[index] = len(values)
            return
        place = self._buffer[:, self._columns[index]]
        if index in self._runs:
            place += values
        else:
            place.copy_(values)
        self._runs[index] = self._runs.get(index, 0) + 1

    def _check_rows(self, rows: int, num_labels: int) -> None:
        wrong = self._uneven if rows == num_labels else dict.fromkeys(sorted(self._runs), rows)
        for index, found in wrong.items():
            name = self._probes[index].name
            raise ValueError(
                f"layer {name!r} ran on {found} instances, but the batch has {num_labels} labels; leave the layer out "
                f"with exclude={name!r}, or pass labels= a function that returns one label per instance"
            )

    def _add(self, ran: list[int], features: Tensor, labels: Tensor) -> None:
        """Add activations (N, features), which are overwritten."""
        columns: slice | Tensor = slice(None)
        for index in ran:
            if self._runs[index] > 1:
                features[:, self._columns[index]] /= self._runs[index]
        if len(ran) < len(self._probes):
            columns = torch.cat([torch.arange(self._sums.squares.numel())[self._columns[index]] for index in ran])
            features = features[:, columns]
        shift, counts, sums, squares = self._sums
        if not all(self._seen[index] for index in ran):
            for index in ran:
                if not self._seen[index]:
                    position = sum(self._sizes[other] for other in ran if other < index)
                    shift[self._columns[index]] = features[0, position : position + self._sizes[index]]
                    self._seen[index] = True
        if len(ran) == len(self._probes) and not self._exact:
            accumulate_offsets_(self._sums, features.sub_(shift), labels)
            return
        zeros = torch.zeros(self.num_classes + 1, features.shape[1], dtype=torch.float64, device=shift.device)
        batch = ClassSums(shift[columns], zeros.new_zeros(self.num_classes), zeros[1:], zeros[0])
        accumulate_offsets_(batch, features.sub_(batch.shift), labels)
        counts[:, columns] += batch.counts.unsqueeze(1)
        sums[:, columns] += batch.sums
        squares[columns] += batch.squares
        self._add_connections(ran, batch)

    def _add_connections(self, ran: list[int], batch: ClassSums) -> None:
        sizes = [self._sizes[index] for index in ran]
        parts = (part.split(sizes, dim=-1) for part in (batch.shift, batch.sums, batch.squares))
        for index, shift, sums, squares in zip(ran, *parts, strict=True):
            if index in self._weights:
                connections = self._exact[self._probes[index].name]
                connections.update(ClassSums(shift, batch.counts, sums, squares), self._weights[index])

    def _check_finite(self, squares: Tensor) -> None:
        for probe, start, size in zip(self._probes, self._starts, self._sizes, strict=True):
            if not bool(torch.isfinite(squares[start : start + size]).all()):
                first_bad = int(self._finite_batches)
                where = (
                    f"first in batch {first_bad} of the epoch" if first_bad < self._batches else "on another process"
                )
                raise ValueError(
                    f"NaN or inf in the activations at the {probe.side} of layer {probe.name!r}, {where}; nothing was "
                    "pruned. Check the data for NaN, lower the learning rate or clip gradients"
                )
