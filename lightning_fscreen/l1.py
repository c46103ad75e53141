"""An L1 penalty on the scales of batch norms, for network slimming."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_fscreen.callback import ScreeningPruningCallback


class ScaleL1(Callback):
    """Train with strength · Σ|γ| over all batch norms added to the loss, until fine-tuning begins (arXiv 1708.06519).

    The loss itself stays as it is: the subgradient strength · sign(γ) is added to the gradients.

    Args:
        strength: factor of the penalty, ≥ 0.

    Raises:
        ValueError: a negative strength.
    """

    def __init__(self, strength: float = 1e-4) -> None:
        super().__init__()
        if strength < 0:
            raise ValueError(f"strength must not be negative, got {strength}")
        self.strength = strength

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to penalise.

        Raises:
            ValueError: no batch norm with a scale.
        """
        if stage == "fit" and not _norms(pl_module):
            raise ValueError(f"{type(pl_module).__name__} has no batch norm with a scale; leave out ScaleL1")

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the subgradient."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(other, ScreeningPruningCallback) and other.fine_tuning for other in callbacks):
            return
        used = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for norm in _norms(pl_module):
            if norm.weight in used and norm.weight.grad is not None:
                norm.weight.grad.add_(norm.weight.sign(), alpha=self.strength)


def _norms(model: LightningModule) -> list[_BatchNorm]:
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.weight is not None and module.weight.requires_grad
    ]
