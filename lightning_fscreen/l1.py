"""L1 penalties: on the scales of batch norms, for network slimming, and on weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_fscreen.callback import ScreeningPruningCallback
from lightning_fscreen.candidates.weights import find_weights
from lightning_fscreen.fit.scaling import gradient_scale


class _L1(Callback, ABC):
    """Train with strength · Σ|p| over some parameters added to the loss, until fine-tuning begins."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        if strength < 0:
            raise ValueError(f"strength must not be negative, got {strength}")
        self.strength = strength
        self._penalised: list[nn.Parameter] = []

    @abstractmethod
    def _find(self, model: LightningModule) -> list[nn.Parameter]:
        """Parameters to penalise.

        Raises:
            ValueError: there are none.
        """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the parameters to penalise.

        Raises:
            ValueError: there is nothing.
        """
        self._penalised = self._find(pl_module)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the subgradient, strength · sign(p)."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(other, ScreeningPruningCallback) and other.fine_tuning for other in callbacks):
            return
        used = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        pairs = [(p.detach(), p.grad) for p in self._penalised if p in used and p.grad is not None]
        if pairs:
            values, gradients = (list(tensors) for tensors in zip(*pairs, strict=True))
            signs = torch._foreach_sign(values)  # noqa: SLF001  # torch has no public ones
            if (scale := gradient_scale(trainer, optimizer)) is not None:
                torch._foreach_mul_(signs, scale)
            torch._foreach_add_(gradients, signs, alpha=self.strength)


class ScaleL1(_L1):
    """Train with strength · Σ|γ| over all batch norms added to the loss, until fine-tuning begins (arXiv 1708.06519).

    The loss itself stays as it is: the subgradient strength · sign(γ) is added to the gradients.

    Args:
        strength: factor of the penalty, ≥ 0.

    Raises:
        ValueError: a negative strength; when training starts, no batch norm with a scale.
    """

    def __init__(self, strength: float = 1e-4) -> None:
        super().__init__(strength)

    def _find(self, model: LightningModule) -> list[nn.Parameter]:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        scales = [norm.weight for norm in norms if norm.weight is not None and norm.weight.requires_grad]
        if not scales:
            raise ValueError(f"{type(model).__name__} has no batch norm with a scale; leave out ScaleL1")
        return scales


class WeightL1(_L1):
    """Train with strength · Σ|w| over the weights of linear and convolution layers, until fine-tuning begins.

    Weight decay shrinks large weights most and hardly moves small ones; this penalty moves all alike, so that the
    network learns to do with few of them before they are pruned. What is left is then trained without it.

    The loss itself stays as it is: the subgradient strength · sign(w) is added to the gradients (0 where w = 0, so
    pruned weights stay so).

    Args:
        strength: factor of the penalty, ≥ 0.
        include: glob patterns over the names of layers to penalise, as in the pruning callback; all of them if None.
        exclude: glob patterns over the names of layers not to penalise.

    Raises:
        ValueError: a negative strength; when training starts, a pattern that matches no layer, or nothing to penalise.
    """

    def __init__(
        self,
        strength: float = 3e-5,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(strength)
        self.include, self.exclude = include, exclude

    def _find(self, model: LightningModule) -> list[nn.Parameter]:
        layers, _ = find_weights(model, self.include, self.exclude)
        return [layer.weight for layer in layers]
