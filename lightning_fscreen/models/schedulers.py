"""Learning-rate schedules whose steps are fractions of the training."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR


def step_decay(
    optimizer: Optimizer, T_max: int, milestones: Sequence[float] = (0.5, 0.75), gamma: float = 0.1
) -> MultiStepLR:
    """Multiply the learning rate by γ at some fractions of the training.

    Args:
        optimizer: the optimizer.
        T_max: length of the training, in steps of the scheduler.
        milestones: ascending fractions of that length, in (0, 1).
        gamma: factor γ.

    Returns:
        torch's MultiStepLR.

    Raises:
        ValueError: a milestone outside (0, 1).
    """
    for milestone in milestones:
        if not 0 < milestone < 1:
            raise ValueError(f"milestones are fractions of the training and must lie in (0, 1), got {milestone}")
    # MultiStepLR takes a milestone at 0, which short trainings would round to, as already passed.
    return MultiStepLR(optimizer, [max(1, round(milestone * T_max)) for milestone in milestones], gamma)
