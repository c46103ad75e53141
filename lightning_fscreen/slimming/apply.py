"""Apply a planned change to a network, unless verification says no."""

from __future__ import annotations

from torch import nn

from lightning_fscreen.slimming.plan import attach_plan
from lightning_fscreen.slimming.planning import Change
from lightning_fscreen.slimming.rewrite import install
from lightning_fscreen.slimming.verify import Verification


def apply_change(network: nn.Module, change: Change, verification: Verification) -> None:
    """Make the network smaller in place, and remember the plan on its layers.

    Raises:
        VerificationError: it would not compute the same; the network is untouched then.
    """
    undo = install(network, change.plan, change.tensors)
    try:
        verification.check(change.tensors)
    except BaseException:
        undo()
        raise
    attach_plan(network, change.plan)
