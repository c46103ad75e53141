"""The statistics of a fit: when the hooks are open, which labels the activations get, and which gradients are added."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from lightning_fscreen.fit.clock import batches_per_round
from lightning_fscreen.fit.distributed import merge_processes
from lightning_fscreen.fit.scaling import gradient_scale
from lightning_fscreen.fit.settings import Settings
from lightning_fscreen.ranking.window import Window
from lightning_fscreen.statistics.collector import ActivationCollector
from lightning_fscreen.statistics.gradients import GradientStatistics, GradientSums
from lightning_fscreen.statistics.labels import class_labels, describe, find_labels, find_num_classes, warn_of_choice
from lightning_fscreen.statistics.padding import find_tokens
from lightning_fscreen.statistics.probes import FeatureStatistics
from lightning_fscreen.statistics.sampling import collection_stride, instances_needed

MakeCollector = Callable[[int], ActivationCollector]

log = logging.getLogger(__name__)


class Collection:
    """Gathers activations between `open` and `close`; `add` then adds them to the sums, with the labels of their batch.

    Args:
        settings: the callback's arguments.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._num_classes = settings.num_classes
        self._collectors: dict[str, ActivationCollector] = {}  # one for every network
        self._gradients: GradientSums | None = None
        self._batch: tuple[Any, int] | None = None  # of the running step, and its index
        self.found_stride: int | None = None  # for collect_every="auto", the same in every process

    @property
    def stride(self) -> int | None:
        """Every so many-th batch is gathered; None while that is not known."""
        return self.found_stride if self._settings.collect_every == "auto" else self._settings.collect_every

    @property
    def is_prepared(self) -> bool:
        """Whether the number of classes and the stride are known."""
        return self._num_classes is not None and self.stride is not None

    def prepare(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, window: Window) -> None:
        """Find the number of classes and, for `collect_every="auto"`, the stride.

        Args:
            trainer: the trainer.
            pl_module: the module that it trains.
            batch: the batch that begins.
            batch_idx: its index in the epoch.
            window: where the training is pruned.

        Raises:
            ValueError: the number of classes cannot be found; no labels in the batch.
        """
        with _naming_batch(batch_idx, trainer):
            given = self._settings.labels(batch)
            labels = class_labels(given)
        if self._num_classes is None:
            datamodule = getattr(trainer, "datamodule", None)
            self._num_classes = find_num_classes(datamodule, pl_module, labels=labels)
        if self._settings.labels is find_labels:
            warn_of_choice(batch, given, self._num_classes)
        if self.stride is None:
            instances = len(labels) * trainer.world_size
            batches = batches_per_round(trainer, window) * self._settings.collect_epochs
            stride = collection_stride(batches, instances, self._num_classes)
            self.found_stride = trainer.strategy.broadcast(stride) if trainer.world_size > 1 else stride
            if window.unit == "step" and batches * instances < instances_needed(self._num_classes):
                log.warning(
                    "%d instances are gathered before each pruning (prune_every=%d), but the tests need %d to find "
                    "small effects with %d classes, and rank the others by magnitude alone; raise prune_every",
                    batches * instances,
                    window.every,
                    instances_needed(self._num_classes),
                    self._num_classes,
                )

    def begin(self, batch: Any, batch_idx: int) -> None:
        """The activations that are gathered from now on are those of this batch."""
        self._batch = batch, batch_idx

    def open(self, makers: Mapping[str, MakeCollector]) -> None:
        """Gather activations from now on.

        Args:
            makers: how the sums of every network are made, by its name.
        """
        assert self._num_classes is not None
        for name in self._collectors.keys() - makers.keys():  # it has turned out to be none
            self._collectors.pop(name).remove()
        tokens = find_tokens(self._batch[0]) if self._batch is not None else None
        for name, make in makers.items():
            if name not in self._collectors:
                self._collectors[name] = make(self._num_classes)
            self._collectors[name].attach(tokens)

    def close(self) -> None:
        """Gather nothing until the next `open`."""
        for collector in self._collectors.values():
            collector.remove()  # even a hook that does nothing costs every forward pass some microseconds

    def add(self, trainer: Trainer) -> None:
        """Add the activations of the batch to the sums.

        Where it holds inputs for as many instances as there are labels, these belong to them: layers that run on other
        numbers of rows (sequences first, windows) have no statistics then, and are no error.

        Raises:
            ValueError: no labels in the batch, labels out of range or of the wrong form; names the batch.
        """
        if self._collectors and self._batch is not None:
            batch, batch_idx = self._batch
            with _naming_batch(batch_idx, trainer, batch if self._settings.labels is find_labels else None):
                given = self._settings.labels(batch)
                labels = class_labels(given)
                tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf is not given]
                belong = any(tensor.ndim > 1 and len(tensor) == len(labels) for tensor in tensors)
                for collector in self._collectors.values():
                    collector.update(labels, belong)
        self._batch = None

    def add_gradients(self, trainer: Trainer, make_sums: Callable[[], GradientSums], optimizer: Optimizer) -> None:
        """Add the gradients that an optimizer is about to use."""
        if self._gradients is None:
            self._gradients = make_sums()
        self._gradients.add(optimizer, gradient_scale(trainer, optimizer))

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
        merge = merge_processes(trainer)
        parts = [collector.statistics(merge) for collector in self._collectors.values()]
        return {name: found for part in parts for name, found in part.items()}

    @property
    def unmatched(self) -> dict[str, str]:
        """Layers without statistics because they ran on other numbers of instances than there are labels; on which."""
        return {name: why for collector in self._collectors.values() for name, why in collector.unmatched.items()}

    def reset(self) -> None:
        """Start the sums afresh."""
        self._gradients = None
        for collector in self._collectors.values():
            collector.reset()

    def end(self) -> None:
        """Remove the hooks, and forget the sums."""
        self._gradients = self._batch = None
        self.close()
        self._collectors.clear()

    def state_dict(self) -> dict[str, Any]:
        """The sums, as tensors and primitives; empty if there are none."""
        state: dict[str, Any] = {} if self._gradients is None else {"gradients": self._gradients.state_dict()}
        if self._collectors:
            state["activations"] = {name: sums.state_dict() for name, sums in self._collectors.items()}
        return state

    def load_state(
        self,
        trainer: Trainer,
        states: Sequence[Mapping[str, Any]],
        stride: int | None,
        makers: Mapping[str, MakeCollector],
        make_sums: Callable[[], GradientSums],
    ) -> None:
        """Continue from the `state_dict` of every process and the stride; additional processes begin with nothing."""
        self.found_stride = stride
        if not any(states):
            return
        own = states[trainer.global_rank] if trainer.global_rank < len(states) else {}
        if "activations" in states[0]:
            first, mine = (
                {} if s is None else _by_network(s, makers) for s in (states[0]["activations"], own.get("activations"))
            )
            self._num_classes = next(iter(first.values()))["num_classes"]
            self.open(makers)
            self.close()
            for name in mine.keys() & self._collectors.keys():
                self._collectors[name].load_state_dict(mine[name])
        if "gradients" in states[0]:
            self._gradients = make_sums()
            self._gradients.load_state_dict(states[0]["gradients"])  # the same in every process


def _by_network(state: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any]:
    """Sums by network; those of earlier versions belong to the only one."""
    return dict.fromkeys(list(names)[:1], state) if "num_classes" in state else state


@contextlib.contextmanager
def _naming_batch(batch_idx: int, trainer: Trainer, batch: Any = None) -> Iterator[None]:
    """Errors name the batch, and what its labels were taken from if that is the place where they usually are."""
    try:
        yield
    except ValueError as error:
        second = isinstance(batch, tuple | list) and not hasattr(batch, "_fields") and len(batch) > 1
        where = f". Labels were taken from the second item of the {describe(batch)}" if second else ""
        raise ValueError(f"training batch {batch_idx} of epoch {trainer.current_epoch}: {error}{where}") from error
