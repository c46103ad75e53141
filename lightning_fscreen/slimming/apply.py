"""Remove the dead slots of a captured network, unless verification refuses."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.interpreter import Off
from lightning_fscreen.slimming.operators import find_slots
from lightning_fscreen.slimming.plan import SlimmingPlan
from lightning_fscreen.slimming.planning import Change, make_change
from lightning_fscreen.slimming.rewrite import install
from lightning_fscreen.slimming.state import attach
from lightning_fscreen.slimming.verify import Verification, VerificationError

log = logging.getLogger(__name__)


def remove_dead_slots(
    network: nn.Module,
    captured: Capture,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    off: Mapping[str, Off] | None = None,
) -> SlimmingPlan:
    """Plan the removal of all dead slots, carry it out in place, verify it, and remember the plan on the layers.

    Sizes in forward are taken for computed; if verification refuses that, they are taken for written as numbers.

    Args:
        network: the network.
        captured: its graph.
        args: example inputs.
        kwargs: example keyword inputs.
        off: batch norm → its channels that are switched off; see `Walk`. With it, train mode is verified, too.

    Returns:
        The plan that was applied; false if there was nothing to remove.

    Raises:
        VerificationError: the smaller network would not compute the same; the network is untouched then.
    """
    slots = find_slots(network, captured, off)
    change = make_change(network, slots)
    if not change.plan:
        return change.plan
    verification = Verification(network, args, kwargs, training=off is not None)
    try:
        _apply(network, change, verification)
    except VerificationError as error:
        if not slots.assumed:
            raise
        log.warning("sizes seem to be written into forward, their channels stay: %s", error)
        change = make_change(network, find_slots(network, captured, off, literal=True))
        if change.plan:
            _apply(network, change, verification)
    return change.plan


def _apply(network: nn.Module, change: Change, verification: Verification) -> None:
    undo = install(network, change.plan, change.tensors)
    try:
        verification.check(change.tensors)
    except BaseException:
        undo()
        raise
    attach(network, change.plan)
