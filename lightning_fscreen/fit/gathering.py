"""The statistics of a fit: when the hooks are open, which labels the activations get, and which gradients are added."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_fscreen.fit.distributed import merge_processes
from lightning_fscreen.fit.settings import Settings
from lightning_fscreen.statistics.collector import ActivationCollector, FeatureStatistics
from lightning_fscreen.statistics.gradients import GradientStatistics, GradientSums
from lightning_fscreen.statistics.labels import class_labels, infer_num_classes
from lightning_fscreen.statistics.sampling import collection_stride


class Collection:
    """Gathers activations between `open` and `close`; `add` then adds them to the sums, with the labels of their batch.

    Args:
        settings: the callback's arguments.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._num_classes = settings.num_classes
        self._collector: ActivationCollector | None = None
        self._gradients: GradientSums | None = None
        self._batch: tuple[Any, int] | None = None  # of the running step, and its index
        self.found_stride: int | None = None  # for collect_every="auto", the same in every process

    def _labels(self, batch: Any) -> Tensor:
        return class_labels(self._settings.labels(batch))

    @property
    def stride(self) -> int | None:
        """Every so many-th batch is gathered; None while that is not known."""
        return self.found_stride if self._settings.collect_every == "auto" else self._settings.collect_every

    @property
    def is_prepared(self) -> bool:
        """Whether the number of classes and the stride are known."""
        return self._num_classes is not None and self.stride is not None

    def prepare(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Find the number of classes and, for `collect_every="auto"`, the stride.

        Raises:
            ValueError: the number of classes cannot be found; no labels in the batch.
        """
        if self._num_classes is None:
            with _naming_batch(batch_idx, trainer):
                labels = self._labels(batch)
            datamodule = getattr(trainer, "datamodule", None)
            self._num_classes = infer_num_classes(datamodule, pl_module, labels=labels)
            if self._num_classes is None:
                model = type(pl_module).__name__
                raise ValueError(f"the number of classes cannot be found in {model}; pass num_classes=")
        if self.stride is None:
            with _naming_batch(batch_idx, trainer):
                instances = len(self._labels(batch)) * trainer.world_size
            batches = trainer.num_training_batches * self._settings.collect_epochs
            stride = collection_stride(batches, instances, self._num_classes)
            self.found_stride = trainer.strategy.broadcast(stride) if trainer.world_size > 1 else stride

    def begin(self, batch: Any, batch_idx: int) -> None:
        """The activations that are gathered from now on are those of this batch."""
        self._batch = batch, batch_idx

    def open(self, make_collector: Callable[[int], ActivationCollector]) -> None:
        """Gather activations from now on."""
        if self._collector is None:
            assert self._num_classes is not None
            self._collector = make_collector(self._num_classes)
        self._collector.attach()

    def close(self) -> None:
        """Gather nothing until the next `open`."""
        if self._collector is not None:
            self._collector.remove()  # even a hook that does nothing costs every forward pass some microseconds

    def add(self, trainer: Trainer) -> None:
        """Add the activations of the batch to the sums.

        Raises:
            ValueError: no labels in the batch, labels out of range or of the wrong form; names the batch.
        """
        if self._collector is not None and self._batch is not None:
            batch, batch_idx = self._batch
            with _naming_batch(batch_idx, trainer):
                self._collector.update(self._labels(batch))
        self._batch = None

    def add_gradients(self, make_sums: Callable[[], GradientSums], optimizer: Optimizer) -> None:
        """Add the gradients that an optimizer is about to use."""
        if self._gradients is None:
            self._gradients = make_sums()
        self._gradients.add(optimizer)

    def gradients(self) -> Mapping[str, GradientStatistics]:
        """Of the steps gathered, by layer; empty if there were none. DDP has averaged them already.

        Raises:
            ValueError: no layer has any.
        """
        return {} if self._gradients is None else self._gradients.statistics()

    def statistics(self, trainer: Trainer) -> Mapping[str, FeatureStatistics]:
        """Of all processes, by layer that ran; empty if nothing was gathered.

        Raises:
            ValueError: NaN or inf activations, no layer that ran, fewer than two classes.
        """
        return {} if self._collector is None else self._collector.statistics(merge_processes(trainer))

    def reset(self) -> None:
        """Start the sums afresh."""
        self._gradients = None
        if self._collector is not None:
            self._collector.reset()

    def end(self) -> None:
        """Remove the hooks, and forget the sums."""
        self._gradients = self._batch = None
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
        stride: int | None,
        make_collector: Callable[[int], ActivationCollector],
        make_sums: Callable[[], GradientSums],
    ) -> None:
        """Continue from the `state_dict` of every process and the stride; additional processes begin with nothing."""
        self.found_stride = stride
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
