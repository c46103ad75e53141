"""The Lightning module that trains and evaluates an image classifier."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

Batch = tuple[Tensor, Tensor]


class ImageClassifier(LightningModule):
    """Cross-entropy training of any network that maps images (N, C, H, W) to logits (N, num_classes).

    Logs ``train/loss``, ``val/loss``, ``val/error``, ``test/loss`` and ``test/error``, once an epoch. An error is the
    fraction of images misclassified, in [0, 1], counted over the whole set.

    Args:
        net: the network.
        optimizer: called with the network's parameters; in a Hydra config, a ``_partial_: true``.
        scheduler: called with the optimizer. A ``T_max`` (cosine) or ``total_steps`` (one-cycle) that it takes and
            that is left open becomes the length of the training: ``trainer.max_epochs``, or
            ``trainer.estimated_stepping_batches`` when ``scheduler_interval`` is "step".
        num_classes: number of logits, checked against what ``net`` returns.
        scheduler_interval: "epoch" or "step", how often the scheduler advances.
        label_smoothing: ε in [0, 1] of the training loss; ``val/loss`` and ``test/loss`` are never smoothed, so that
            they compare across runs.

    Raises:
        ValueError: for an unknown ``scheduler_interval`` or a ``label_smoothing`` outside [0, 1].
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        num_classes: int = 10,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"scheduler_interval must be 'epoch' or 'step', got {scheduler_interval!r}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
        self.net = net
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.num_classes = num_classes
        self.scheduler_interval = scheduler_interval
        self.label_smoothing = label_smoothing
        self._loss_sum: Tensor | float = 0.0
        self._loss_count = 0
        self.val_error = MeanMetric()
        self.test_error = MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes).

        Raises:
            ValueError: if ``net`` returns another number of logits than ``num_classes``.
        """
        logits: Tensor = self.net(x)
        if logits.shape[1:] != (self.num_classes,):
            raise ValueError(
                f"net returned a tensor of shape {tuple(logits.shape)}, not (N, {self.num_classes}): "
                "give the network and the classifier the same num_classes"
            )
        return logits

    def on_train_epoch_start(self) -> None:
        """Start the mean of the training loss afresh."""
        self._loss_sum, self._loss_count = 0.0, 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross entropy of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        # self.log takes about 0.5 ms, where a whole step of a small network takes 1 ms: log once an epoch.
        self._loss_sum = self._loss_sum + loss.detach().float() * len(labels)
        self._loss_count += len(labels)
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the mean of the training loss over the images of the epoch."""
        if self._loss_count:
            mean = self._loss_sum / self._loss_count
            self.log("train/loss", mean, sync_dist=True, batch_size=self._loss_count)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to ``val/loss`` and ``val/error``."""
        self._evaluate(batch, "val", self.val_error)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to ``test/loss`` and ``test/error``."""
        self._evaluate(batch, "test", self.test_error)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the logits (N, num_classes) of a batch."""
        logits: Tensor = self(batch[0])
        return logits

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and, if there is one, the scheduler.

        Raises:
            ValueError: if the scheduler's length is left open and the trainer has no end to take it from.
        """
        optimizer = self.optimizer(self.net.parameters())
        if self.scheduler is None:
            return optimizer
        length = _open_length(self.scheduler)
        scheduler = partial(self.scheduler, **{length: self._training_length(length)}) if length else self.scheduler
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler(optimizer), "interval": self.scheduler_interval},
        }

    def _evaluate(self, batch: Batch, stage: str, error: MeanMetric) -> None:
        images, labels = batch
        logits = self(images)
        error.update((logits.argmax(dim=1) != labels).float())
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), sync_dist=True, batch_size=len(labels))
        self.log(f"{stage}/error", error, prog_bar=stage == "val", batch_size=len(labels))

    def _training_length(self, parameter: str) -> int:
        """Number of times the scheduler will advance."""
        by_epoch = self.scheduler_interval == "epoch"
        length = self.trainer.max_epochs if by_epoch else self.trainer.estimated_stepping_batches
        if length is None or length < 1 or math.isinf(length):
            bound = "trainer.max_epochs" if by_epoch else "trainer.max_epochs or trainer.max_steps"
            raise ValueError(
                f"the scheduler's {parameter} cannot follow a training without end: set it, or set {bound}"
            )
        return int(length)


def _open_length(scheduler: Callable[[Optimizer], LRScheduler]) -> str | None:
    """Name of the scheduler's parameter for the length of the training, if it has one that nothing binds."""
    # The signature of a partial shows what is bound as the default.
    parameters = inspect.signature(scheduler).parameters
    # OneCycleLR takes its length as epochs × steps_per_epoch instead.
    if "epochs" in parameters and parameters["epochs"].default is not None:
        return None
    for name in ("T_max", "total_steps"):
        if name in parameters and parameters[name].default in (inspect.Parameter.empty, None):
            return name
    return None
