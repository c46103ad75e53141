"""Remove the dead slots of a captured network, unless verification refuses."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.interpreter import Off
from lightning_fscreen.slimming.operators import find_slots
from lightning_fscreen.slimming.plan import SlimmingPlan, attach_plan
from lightning_fscreen.slimming.planning import Change, make_change
from lightning_fscreen.slimming.rewrite import Undo, install
from lightning_fscreen.slimming.slots import Assumption
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

    Sizes in forward are taken for computed; if verification refuses that, it is found out by trying which lines of the
    source have them written as numbers.

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
    change = make_change(network, slots, off)
    if not change.plan:
        return change.plan
    verification = Verification(network, args, kwargs, training=off is not None)
    try:
        _apply(network, change, verification)
    except VerificationError as error:
        if not slots.assumed:
            raise
        log.info("sizes seem to be written into forward: %s", error)
        change = _apply_literally(network, captured, off, slots.assumed, verification)
    attach_plan(network, change.plan)
    return change.plan


def _apply_literally(
    network: nn.Module,
    captured: Capture,
    off: Mapping[str, Off] | None,
    assumed: Mapping[str, Assumption],
    verification: Verification,
) -> Change:
    """Find the lines of the source that have sizes written as numbers, by trying; their channels stay.

    Numbers that are attributes of their module are changed with the channels.
    """

    def attempt(lines: Collection[str]) -> Change:
        literal = {name for name, assumption in assumed.items() if assumption.line in lines}
        change = make_change(network, find_slots(network, captured, off, literal), off, attributes=True)
        if change.plan:
            _apply(network, change, verification)()
        return change

    lines: list[str] = []
    try:
        change = attempt(lines)
    except VerificationError:
        lines = list(dict.fromkeys(assumption.line for assumption in assumed.values()))
        change = attempt(lines)
    for line in list(lines) if len(lines) > 1 else []:
        try:
            change = attempt([other for other in lines if other != line])
        except VerificationError:
            continue
        lines.remove(line)
    if change.plan:
        _apply(network, change, verification)
    for line in lines:
        log.warning("sizes are written into forward as numbers, so channels stay there: %s", line)
    return change


def _apply(network: nn.Module, change: Change, verification: Verification) -> Undo:
    undo = install(network, change.plan, change.tensors)
    try:
        verification.check(change.tensors)
    except BaseException:
        undo()
        raise
    return undo
