"""A run that is killed at any moment and resumed ends like the one that was not, bit by bit.

Lightning's checkpoints hold weights, optimizers and counters, the pruning callback's state what it needs itself. Here
is what else a run of `fscreen` goes on with: random numbers, the metrics logged, and checkpoints that are whole.
The order of the batches is the data's (`ImageDataModule.train_dataloader`).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_fscreen.cli.metrics import CSVLogger
from lightning_fscreen.files import replacing


class EpochSeed(Callback):
    """Makes the global random numbers of every epoch a function of (seed, epoch), the same in all processes.

    Augmentation, dropout and whatever else draws in a training step then do not depend on what was drawn in the epochs
    before, which a resumed run has not seen.

    Args:
        seed: the run's.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed; an epoch that is resumed at its end has no start."""
        self._seed(trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed."""
        self._seed(trainer.current_epoch)

    def _seed(self, epoch: int) -> None:
        # Mixed, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
        own = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
        random.seed(own)
        np.random.seed(own)
        torch.manual_seed(own)


class KeepMetrics(Callback):
    """Lets every epoch stand in metrics.csv once, whenever the run was killed.

    Lightning writes an epoch's checkpoint before it logs the metrics of the epoch, and may be killed between the two or
    in the middle of a later epoch. The checkpoint therefore holds the number of rows that there were, the row that was
    to come, and the latest values.

    Args:
        folder: the run's; checkpoints from elsewhere begin a new file.

    Attributes:
        latest: values as of the checkpoint that was resumed, by name: all that there are if nothing was left to train.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.latest: dict[str, float] = {}
        self._saved: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what has been logged, and what is about to be."""
        progress = trainer.fit_loop.epoch_progress.current
        row: dict[str, float] = {}
        if progress.completed < progress.processed:  # type: ignore[attr-defined]  # in the hooks at the end of an epoch
            # The only access to metrics that are to be logged, without those of earlier epochs; in all processes.
            metrics = trainer._logger_connector.metrics["log"]  # noqa: SLF001
            row = {name: float(value) for name, value in metrics.items()}
        checkpoint["logged"] = {
            "rows": [len(logger.experiment.rows) for logger in _files(trainer)],
            "row": row | {"epoch": trainer.current_epoch} if row else {},
            "latest": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "step": trainer.fit_loop.epoch_loop._batches_that_stepped - 1,  # noqa: SLF001
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember it."""
        self._saved = checkpoint.get("logged")
        self.latest = self._saved["latest"] if self._saved else {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the file of this folder, if the checkpoint is of this folder, too."""
        saved, self._saved = self._saved, None
        if saved is None or self.folder not in Path(str(trainer.ckpt_path)).resolve().parents:
            return
        for logger, count in zip(_files(trainer), saved["rows"], strict=False):
            logger.keep(count)
        for each in trainer.loggers if saved["row"] else ():
            each.log_metrics(dict(saved["row"]), saved["step"])
            each.save()


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole or not there.

    Lightning writes into the folder for temporary files and moves the file from there, which copies it if that folder
    is on another disk: a kill could then leave half a last.ckpt.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write beside the place, and rename."""
        if "://" in str(path):  # a remote file system
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            super().save_checkpoint(checkpoint, partial, storage_options)


def _files(trainer: Trainer) -> list[CSVLogger]:
    """The metrics.csv files that this process writes."""
    return [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)] if trainer.is_global_zero else []
