"""Slim a network in a fit or at its end: the optimizers, the schedulers and the strategy go along."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fscreen.candidates.granularity import Granularity
from lightning_fscreen.fit.copies import Copies
from lightning_fscreen.fit.distributed import all_or_none, broadcast_buffers, rewrap
from lightning_fscreen.fit.networks import Network
from lightning_fscreen.modules import is_within
from lightning_fscreen.slimming import CaptureError, SlimmingPlan, VerificationError
from lightning_fscreen.slimming.double import let_go
from lightning_fscreen.slimming.optimizers import check_state, follow_plan, unwrapped

log = logging.getLogger(__name__)


def slim_in_fit(
    trainer: Trainer,
    pl_module: LightningModule,
    slim: Callable[[], SlimmingPlan],
    is_over: bool = False,
) -> SlimmingPlan:
    """Slim the network of a module between two epochs, or after the last: the Trainer may save a checkpoint then.

    Args:
        trainer: the trainer.
        pl_module: the module that it trains.
        slim: makes the network smaller, in place; returns the plan, with names as in `pl_module`.
        is_over: whether nothing is trained any more: an optimizer whose state cannot be cut is left behind.

    Returns:
        The plan.

    Raises:
        NotImplementedError: an optimizer whose state cannot be cut.
        VerificationError: outputs would change.
        Nothing has changed after an error.
    """
    before = dict(pl_module.named_parameters())
    optimizers = _those_that_can_follow(unwrapped(trainer.optimizers), before, is_over)
    broadcast_buffers(trainer, pl_module)
    plan = slim()
    follow_plan(optimizers, pl_module, before, plan)
    rewrap(trainer)
    return plan


def _those_that_can_follow(
    optimizers: Iterable[Optimizer], parameters: Mapping[str, nn.Parameter], is_over: bool
) -> list[Optimizer]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    able = []
    for optimizer in optimizers:
        try:
            check_state([optimizer], names)
        except NotImplementedError as error:
            if not is_over:
                raise
            log.info("checkpoints that are saved from here on hold optimizer state of the larger network: %s", error)
        else:
            able.append(optimizer)
    return able


def slim_networks(
    trainer: Trainer,
    model: LightningModule,
    granularity: Granularity[Any],
    networks: Iterable[Network],
    kept: Mapping[str, Tensor],
    copies: Copies,
) -> tuple[SlimmingPlan, str | None]:
    """Make every network of a module smaller by itself; those where that is not exact stay as they are.

    Args:
        trainer: the trainer, whose processes do the same to every network.
        model: the module.
        granularity: its candidates.
        networks: its networks, which share no parameters.
        kept: layer → mask of its candidates.
        copies: copies of the networks, which become smaller with them.

    Returns:
        The plan, with names as in the module, and why some networks stay; None if none does.

    Raises:
        CaptureError, VerificationError: none of them can be made smaller.
    """
    plan, errors = SlimmingPlan(), {}
    for network in networks:
        prefix = f"{network.name}." if network.name else ""
        inside = {name.removeprefix(prefix): mask for name, mask in kept.items() if is_within(name, network.name)}
        args, kwargs = network.inputs_on_device()
        try:
            with all_or_none(trainer) as agree, network.examining(model):
                own = granularity.slim(network.module, args, kwargs, inside, copies.following(network.name), agree)
        except (CaptureError, VerificationError) as error:
            let_go(error)
            errors[network.describe()] = error
        else:
            plan = plan.then(copies.plans(network.name, own))
    if not errors:
        return plan, None
    if not plan:
        raise next(iter(errors.values()))
    reasons = "; ".join(f"{name}: {error}" for name, error in errors.items())
    log.warning("not all networks became smaller, the masks of the others stay: %s", reasons)
    return plan, reasons


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
