"""Remove units and channels that are left without incoming or without outgoing weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_fscreen.slimming.apply import Agree, remove_dead_slots, unanimous
from lightning_fscreen.slimming.capture import capture
from lightning_fscreen.slimming.copies import Copy
from lightning_fscreen.slimming.plan import SlimmingPlan


def remove_dead_units(
    network: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    copies: Sequence[Copy] = (),
    agree: Agree = unanimous,
) -> SlimmingPlan:
    """Physically remove hidden units and channels that do nothing, in place; outputs in eval mode stay the same.

    Units without outgoing weights are removed with all units that only they read; the output of units without incoming
    weights is a constant, which is carried into the biases of the layers that read it. Units that cannot be removed
    exactly stay.

    Args:
        network: any module that `torch.export` can capture.
        args: example inputs of its forward, with at least two instances so that no size is 1 by chance.
        kwargs: example keyword inputs.
        copies: copies of the network, which lose the same units; their weights are zero where the network's are.
        agree: is asked with the plan, once it has been carried out and verified; undoes it by raising.

    Returns:
        The plan that was applied; false if there was nothing to remove.

    Raises:
        CaptureError: the network cannot be captured.
        VerificationError: outputs differ in float64 on the example or on random inputs, or forward fails on the smaller
            network; a copy would lose other units.
        The network is untouched after an error.
    """
    kwargs = dict(kwargs or {})
    return remove_dead_slots(network, capture(network, args, kwargs), args, kwargs, copies=copies, agree=agree)
