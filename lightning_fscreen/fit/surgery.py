"""Slim a network in the middle of a fit: the optimizers, the schedulers and the strategy go along."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_fscreen.fit.distributed import broadcast_buffers, rewrap
from lightning_fscreen.slimming.optimizers import check_state, follow_plan
from lightning_fscreen.slimming.plan import SlimmingPlan


def slim_in_fit(
    trainer: Trainer,
    pl_module: LightningModule,
    slim: Callable[[], SlimmingPlan],
) -> SlimmingPlan:
    """Slim the network of a module between two epochs.

    Args:
        trainer: the trainer.
        pl_module: the module that it trains.
        slim: makes the network smaller, in place; returns the plan, with names as in `pl_module`.

    Returns:
        The plan.

    Raises:
        NotImplementedError: an optimizer whose state cannot be cut.
        VerificationError: outputs would change.
        Nothing has changed after an error.
    """
    before = dict(pl_module.named_parameters())
    check_state(trainer.optimizers, {parameter: name for name, parameter in before.items()})
    broadcast_buffers(trainer, pl_module)
    plan = slim()
    follow_plan(trainer.optimizers, pl_module, before, plan)
    rewrap(trainer)
    return plan


def forget_scores(trainer: Trainer) -> None:
    """Let ModelCheckpoint and EarlyStopping look for the best score afresh: those of the larger network hide others.

    ModelCheckpoint goes on counting its files, as the worst there can be: each is replaced once another is written.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            worst = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
            callback.best_k_models = dict.fromkeys(callback.best_k_models, worst)
            callback.best_model_path = ""
            callback.best_model_score = None
            callback.kth_value = worst
        if isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(torch.inf if callback.monitor_op == torch.lt else -torch.inf)
