"""Where a Trainer is in its training, and its length, in epochs or in optimizer steps."""

from __future__ import annotations

import logging
import math

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_fscreen.fit.settings import Settings
from lightning_fscreen.ranking.window import Length, Window, window_in_epochs, window_in_steps

log = logging.getLogger(__name__)


def position(trainer: Trainer, window: Window) -> int:
    """The number of epochs, or of optimizer steps (those that `max_steps` counts), that are completed."""
    return trainer.current_epoch if window.unit == "epoch" else trainer.global_step


def batches_per_round(trainer: Trainer, window: Window) -> float:
    """Training batches of this process in a round, or fewer where the module decides when to step; inf if unknown."""
    if window.unit == "epoch":
        return trainer.num_training_batches
    if trainer.lightning_module.automatic_optimization:
        return window.every * trainer.accumulate_grad_batches
    return max(window.every // max(len(trainer.optimizers), 1), 1)  # every optimizer's steps are counted


def find_length(trainer: Trainer, loaded: bool) -> Length:
    """How long a training is at most.

    Args:
        trainer: the trainer.
        loaded: whether its data has been loaded, so that the number of batches can be asked for.
    """
    epochs = None if trainer.max_epochs is None or trainer.max_epochs < 0 else trainer.max_epochs
    steps = None if trainer.max_steps < 0 else trainer.max_steps
    # Modules that step by themselves, and a changing accumulation, make any number of steps in an epoch.
    regular = trainer.lightning_module.automatic_optimization and not any(
        isinstance(callback, GradientAccumulationScheduler)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )
    batches = trainer.num_training_batches if loaded and regular else math.inf
    known = 0 < batches < math.inf
    return Length(epochs, steps, math.ceil(batches / trainer.accumulate_grad_batches) if known else None)


def find_window(settings: Settings, trainer: Trainer, loaded: bool) -> Window | None:
    """The window of a training; None if that depends on the data, which has not been loaded.

    A training of less than two epochs, or of `max_steps` alone, has a window in steps unless epochs are asked for.

    Args:
        settings: the callback's arguments.
        trainer: the trainer.
        loaded: whether its data has been loaded.

    Raises:
        ValueError: a window that ends after the training, or none given for a training of unknown length.
    """
    start, end = settings.start_epoch, settings.end_epoch
    length = find_length(trainer, loaded)
    if end == 0:
        return window_in_epochs(start, end, length)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return Window(0, 1)  # a few batches that go through everything
    if settings.in_steps:
        waits = settings.end_step is None and length.total_steps is None and length.epochs is not None and not loaded
        if waits:
            return None
        return window_in_steps(settings.start_step, settings.end_step, settings.prune_every, length)
    if end is None and start == 0 and length.is_short:
        return window_in_steps(None, None, None, length)
    return window_in_epochs(start, end, length)


def warn_without_fine_tuning(window: Window, length: Length) -> None:
    """Warn if the training ends with the last pruning."""
    last = length.last(window.unit)
    if last is not None and 0 < last <= window.end:
        log.warning(
            "pruning ends with %s %d, and so does the training: nothing is trained after the last pruning, which the "
            "network needs to recover from it; let pruning end earlier (end_epoch=, or end_step= within an epoch; left "
            "out, it ends after half of the training), or train longer",
            window.unit,
            window.end,
        )


def warn_before_the_end(window: Window, position: int, pruned: float, amount: float) -> None:
    """Warn that a training has ended before its window did.

    Args:
        window: the window.
        position: where the training ended.
        pruned: fraction of the candidates that are pruned.
        amount: fraction that was asked for.
    """
    log.warning(
        "training ended with %s, before everything was pruned (end_%s=%d): %.1f %% of the candidates are, %.1f %% were "
        "asked for; train longer, set end_%s earlier, or make EarlyStopping more patient",
        window.name(position),
        window.unit,
        window.end,
        100 * pruned,
        100 * amount,
        window.unit,
    )
