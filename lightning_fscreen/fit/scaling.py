"""By how much the gradients of a step are too large, where mixed precision scales the loss."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer


def gradient_scale(trainer: Trainer, optimizer: Optimizer) -> Tensor | None:
    """By which factor the gradients that an optimizer is about to use are larger than those of the loss.

    With precision "16-mixed" the loss is scaled, and Lightning unscales the gradients before its hooks run; but not for
    fused optimizers, which do so within their step, nor where `training_step` returned nothing.

    Args:
        trainer: the trainer.
        optimizer: the optimizer.

    Returns:
        The factor, a scalar tensor on the parameters' device, which nobody waits for; None if it is 1.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return None
    state = scaler._per_optimizer_states.get(id(optimizer), {})  # noqa: SLF001  # torch has no public one
    if state.get("stage") is OptState.UNSCALED:
        return None
    device = next(parameter.device for group in optimizer.param_groups for parameter in group["params"])
    scale: Tensor = scaler.scale(torch.ones((), device=device))  # get_scale would wait for the device
    return scale
