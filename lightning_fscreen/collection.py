"""The statistics of a fit: when the hooks are open, which labels the activations get, and which gradients are added."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_fscreen.collect import ActivationCollector, FeatureStatistics
from lightning_fscreen.distributed import merge_processes
from lightning_fscreen.gradients import GradientStatistics, GradientSums
from lightning_fscreen.labels import class_labels, infer_num_classes
from lightning_fscreen.sampling import collection_stride


class Collection:
    """Gathers activations between `open` and `close`, and `add` gives them the labels of their batch.

    Args:
        labels: batch → class indices (N,) or class weights (N, C).
        num_classes: number of classes; None to find it at the first batch.
    """

    def __init__(self, labels: Callable[[Any], Tensor], num_classes: int | None) -> None:
        self._find_labels = labels
        self._num_classes = num_classes
        self._collector: ActivationCollector | None = None
        self._gradients: GradientSums | None = None
        self.stride: int | None = None
        """Every how-manieth batch is gathered, where that is up to us; the same in every process."""

    def _labels(self, batch: Any) -> Tensor:
        return class_labels(self._find_labels(batch))

    def is_due(
        self, trainer: Trainer, batch: Any, batch_idx: int, collect_every: int | Literal["auto"], epochs: int
    ) -> bool:
        """Whether to gather a batch.

        Args:
            trainer: the trainer.
            batch: the batch.
            batch_idx: its place in the epoch.
            collect_every: every how-manieth; "auto" for as many as the tests need, see `sampling`.
            epochs: over how many epochs.

        Raises:
            ValueError: no labels in the batch.
        """
        if collect_every != "auto":
            return batch_idx % collect_every == 0
        if self.stride is None:
            assert self._num_classes is not None
            with _naming_batch(batch_idx, trainer):
                instances = len(self._labels(batch)) * trainer.world_size
            stride = collection_stride(trainer.num_training_batches * epochs, instances, self._num_classes)
            self.stride = trainer.strategy.broadcast(stride) if trainer.world_size > 1 else stride
        return batch_idx % self.stride == 0

    def find_classes(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Find the number of classes, unless it is known.

        Raises:
            ValueError: it cannot be found; no labels in the batch.
        """
        if self._num_classes is not None:
            return
        with _naming_batch(batch_idx, trainer):
            labels = self._labels(batch)
        datamodule = getattr(trainer, "datamodule", None)
        self._num_classes = infer_num_classes(datamodule, pl_module, labels=labels)
        if self._num_classes is None:
            raise ValueError(f"the number of classes cannot be found in {type(pl_module).__name__}; pass num_classes=")

    def open(self, make_collector: Callable[[int], ActivationCollector]) -> None:
        """Gather what runs from here on."""
        if self._collector is None:
            assert self._num_classes is not None
            self._collector = make_collector(self._num_classes)
        self._collector.attach()

    def close(self) -> None:
        """Gather nothing until the next `open`."""
        if self._collector is not None:
            self._collector.remove()  # even a hook that does nothing costs every forward pass some microseconds

    def add(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Add what was gathered to the sums.

        Raises:
            ValueError: no labels in the batch, labels out of range or of the wrong form; names the batch.
        """
        if self._collector is not None:
            with _naming_batch(batch_idx, trainer):
                self._collector.update(self._labels(batch))

    def add_gradients(self, make_sums: Callable[[], GradientSums], optimizer: Optimizer) -> None:
        """Add the gradients that an optimizer is about to use."""
        if self._gradients is None:
            self._gradients = make_sums()
        self._gradients.add(optimizer)

    def gradients(self) -> Mapping[str, GradientStatistics]:
        """Of the steps gathered, by layer; empty if there were none. DDP has averaged them already.

        Raises:
            ValueError: a layer without gradients.
        """
        return {} if self._gradients is None else self._gradients.statistics()

    def statistics(self, trainer: Trainer) -> Mapping[str, FeatureStatistics]:
        """Of all processes, by layer; empty if nothing was gathered.

        Raises:
            ValueError: NaN or inf activations, a layer that never ran, fewer than two classes.
        """
        return {} if self._collector is None else self._collector.statistics(merge_processes(trainer))

    def reset(self) -> None:
        """Start the sums afresh."""
        self._gradients = None
        if self._collector is not None:
            self._collector.reset()

    def end(self) -> None:
        """Take the hooks away, and forget the sums."""
        self._gradients = None
        if self._collector is not None:
            self._collector.remove()
            self._collector = None

    def state_dict(self) -> dict[str, Any]:
        """The sums, as tensors and primitives; empty if there are none."""
        parts = {"activations": self._collector, "gradients": self._gradients}
        return {name: sums.state_dict() for name, sums in parts.items() if sums is not None}

    def load_state(
        self,
        trainer: Trainer,
        states: Sequence[Mapping[str, Any]],
        make_collector: Callable[[int], ActivationCollector],
        make_sums: Callable[[], GradientSums],
    ) -> None:
        """Continue from what `state_dict` gave in every process; additional processes begin with nothing."""
        if not any(states):
            return
        own = states[trainer.global_rank] if trainer.global_rank < len(states) else {}
        if "activations" in states[0]:
            self._num_classes = states[0]["activations"]["num_classes"]
            self.open(make_collector)
            self.close()
            assert self._collector is not None
            if own:
                self._collector.load_state_dict(own["activations"])
        if "gradients" in states[0]:
            self._gradients = make_sums()
            self._gradients.load_state_dict(states[0]["gradients"])  # the same in every process


@contextlib.contextmanager
def _naming_batch(batch_idx: int, trainer: Trainer) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"training batch {batch_idx} of epoch {trainer.current_epoch}: {error}") from error
