"""Where a fit began: weights, learning rates and schedules, to rewind to."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_fscreen.slimming import SlimmingPlan


class Origin:
    """The learning rates and the schedules' state at the start of a fit; its weights, if they are remembered.

    Args:
        trainer: the trainer, before it has restored a checkpoint's schedulers.

    Attributes:
        weights: parameters and buffers as in a state dict, at full size; empty if they are not needed.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.weights: dict[str, Tensor] = {}
        self._schedulers: list[dict[str, Any]] = [
            copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs
        ]
        self._rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in trainer.optimizers]

    def remember_weights(self, model: LightningModule, restored: Mapping[str, Tensor] | None) -> None:
        """Remember those of a checkpoint or, without one, those that the model has now."""
        own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        self.weights = dict(restored) if restored else copy.deepcopy(own)

    @torch.no_grad()
    def rewind_weights(self, model: LightningModule, plan: SlimmingPlan, optimizers: Iterable[Optimizer]) -> None:
        """Put the weights of a model that was slimmed by `plan` back (lottery ticket); optimizers begin afresh."""
        for name, value in model.state_dict(keep_vars=True).items():
            if isinstance(value, Tensor) and name in self.weights:
                value.copy_(plan.cut(name, self.weights[name].to(value.device)))
        self.weights = {}
        for optimizer in optimizers:
            optimizer.state.clear()

    def rewind_rates(self, trainer: Trainer) -> None:
        """Start the schedules again (learning-rate rewinding, arXiv 2003.02389)."""
        for config, state in zip(trainer.lr_scheduler_configs, self._schedulers, strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))
        for optimizer, rates in zip(trainer.optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                if isinstance(group["lr"], Tensor):  # of capturable and compiled optimizers: schedules fill it in place
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
