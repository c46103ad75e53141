"""Remove the dead slots of a captured network, unless verification refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from torch import nn

from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.copies import Copy
from lightning_fscreen.slimming.double import let_go
from lightning_fscreen.slimming.interpreter import Off
from lightning_fscreen.slimming.operators import find_slots
from lightning_fscreen.slimming.plan import SlimmingPlan
from lightning_fscreen.slimming.planning import Change, Numbers, make_change
from lightning_fscreen.slimming.rewrite import Undo, install
from lightning_fscreen.slimming.sizes import Sizes, stale_sizes
from lightning_fscreen.slimming.slots import Assumption
from lightning_fscreen.slimming.state import attach
from lightning_fscreen.slimming.verify import OtherSizeError, Verification, VerificationError

log = logging.getLogger(__name__)

Agree = Callable[[SlimmingPlan], None]
"""Is called with a plan that has been carried out and verified, and undoes it by raising."""


def unanimous(plan: SlimmingPlan) -> None:
    """Agree with every plan: there is nobody to ask."""


def remove_dead_slots(
    network: nn.Module,
    captured: Capture,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    off: Callable[[], Mapping[str, Off]] | None = None,
    copies: Sequence[Copy] = (),
    agree: Agree = unanimous,
    round_to: int = 1,
) -> SlimmingPlan:
    """Plan the removal of all dead slots, carry it out in place, verify it, and remember the plan on the layers.

    Sizes in forward are taken for computed; if verification refuses that, it is found out by trying which lines of the
    source have them written as numbers. Constants that go are carried into other layers; where that is right at the
    sizes of the example alone (padding to an even size, sums divided by the square root of a length), those stay that
    are not zero.

    Args:
        network: the network.
        captured: its graph.
        args: example inputs.
        kwargs: example keyword inputs.
        off: gives batch norm → its channels that are switched off, of the values that the network has then; see
            `Walk`. With it, train mode is verified, too.
        copies: copies of the network, which lose the same slots; each is planned and verified with its own values.
        agree: has the last word.
        round_to: number of which widths of layers become multiples, see `make_change`.

    Returns:
        The plan that was applied; false if there was nothing to remove.

    Raises:
        VerificationError: the smaller network, or a smaller copy, would not compute the same, or a copy would lose
            other slots; network and copies are untouched then, as after an error of `agree`.
    """
    zeros_alone = False

    def change(literal: Collection[str] = (), numbers: Numbers = "computed") -> tuple[Change, Mapping[str, Assumption]]:
        switched = off and off()
        slots = find_slots(network, captured, switched, literal)
        return make_change(network, slots, switched, numbers, round_to, zeros_alone), slots.assumed

    def carry_out(own: Change, literal: Collection[str] = (), numbers: Numbers = "computed") -> Undo:
        for follower in followers:
            follower.plan(lambda: _replace_sizes(change(literal, numbers)[0], own.plan.sizes), own)
        return _apply(network, own, verification, followers)

    def rehearse() -> None:
        verification.rehearse(args, kwargs, captured.training)

    def attempt(literal: Collection[str], numbers: Numbers) -> tuple[Change, Undo]:
        own, _ = change(literal, numbers)
        own = _with_stale_sizes(network, own, rehearse)
        return own, carry_out(own, literal, numbers) if own.plan else _nothing

    def carried_out(own: Change, assumed: Mapping[str, Assumption]) -> tuple[Change, Undo]:
        try:
            return own, carry_out(own) if own.plan else _nothing
        except OtherSizeError:
            raise
        except VerificationError as error:
            if not assumed:
                raise
            let_go(error)
            log.info("sizes seem to be written into forward: %s", error)
            return _take_literally(attempt, assumed)

    own, assumed = change()
    if not own.plan:
        return own.plan
    verification = Verification(network, args, kwargs, training=off is not None)
    if own.exact:
        verification.look_elsewhere()
    followers = [_Follower(copy, network, args, kwargs, off is not None) for copy in copies]
    try:
        own, undo = carried_out(own, assumed)
    except OtherSizeError as error:
        let_go(error)
        log.info("constants depend on the sizes of the input: %s", error)
        zeros_alone = True
        try:
            own, undo = carried_out(*change())
        except OtherSizeError as elsewhere:
            let_go(elsewhere)
            log.warning("the smaller network is right at the sizes of the example alone: %s", elsewhere)
            verification.stay_here()
            zeros_alone = False
            own, undo = carried_out(*change())
    try:
        agree(own.plan)
    except BaseException:
        undo()
        raise
    attach(network, own.plan)
    for follower in followers:
        follower.copy.attach(own.plan)
    return own.plan


def _with_stale_sizes(network: nn.Module, change: Change, rehearse: Callable[[], None]) -> Change:
    """The change, with those of its sizes that do not follow by themselves.

    Raises:
        VerificationError: the smaller network does not run.
    """
    if not change.plan.sizes:
        return change
    undo = install(network, replace(change.plan, sizes={}), change.tensors)
    try:
        return _replace_sizes(change, stale_sizes(network, change.plan.sizes, rehearse))
    except Exception as error:  # whatever forward raises
        let_go(error)
        raise VerificationError(f"forward of {type(network).__name__} fails on the smaller network: {error}") from error
    finally:
        undo()


def _replace_sizes(change: Change, sizes: Sizes) -> Change:
    """A change with other sizes."""
    return replace(change, plan=replace(change.plan, sizes=sizes))


def _nothing() -> None:
    """Undo nothing."""


def _take_literally(
    attempt: Callable[[Collection[str], Numbers], tuple[Change, Undo]], assumed: Mapping[str, Assumption]
) -> tuple[Change, Undo]:
    """Let numbers follow the channels that they count: as attributes of their module, or where calls are given them.

    Where neither does, find the lines of the source that have them, by trying; their channels stay.
    """

    def literally(lines: Collection[str], numbers: Numbers = "attributes") -> tuple[Change, Undo]:
        return attempt({name for name, assumption in assumed.items() if assumption.line in lines}, numbers)

    for numbers in get_args(Numbers)[1:]:
        try:
            return literally([], numbers)
        except VerificationError as error:
            let_go(error)
            log.info("numbers in forward do not follow as %s: %s", numbers, error)
    lines = list(dict.fromkeys(assumption.line for assumption in assumed.values()))
    own, undo = literally(lines)
    for line in list(lines) if len(lines) > 1 else []:
        undo()
        try:
            own, undo = literally([other for other in lines if other != line])
        except VerificationError:
            own, undo = literally(lines)
            continue
        lines.remove(line)
    for line in lines:
        log.warning("sizes are written into forward as numbers, so channels stay there: %s", line)
    return own, undo


class _Follower:
    """A copy of a network on its way to become smaller."""

    def __init__(
        self, copy: Copy, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool
    ) -> None:
        self.copy, self._network = copy, network
        with copy.worn_by(network):
            self._verification = Verification(network, args, kwargs, training)

    def plan(self, change: Callable[[], Change], own: Change) -> None:
        """Find its new tensors.

        Raises:
            VerificationError: it would be cut in another way than the network, or constants of its own would go into
                a layer that it shares with the network.
        """
        with self.copy.worn_by(self._network):
            self.change = change()
        if not self.change.plan.is_like(own.plan):
            raise VerificationError(
                f"{self.copy.name} would lose other channels than the network that it is a copy of, because values "
                "that are constant there are not constant here; it cannot follow"
            )
        for name, exact in self.change.exact.items():
            if not self.copy.has(name) and not exact.is_close(own.exact.get(name)):
                raise VerificationError(
                    f"constants of {self.copy.name} would have to be carried into {name!r}, which is no part of the "
                    "copy; it cannot follow"
                )

    def check(self) -> None:
        """Verify the copy, which has become smaller, as the network has."""
        with self.copy.worn_by(self._network):
            try:
                self._verification.check(self.change.exact)
            except VerificationError as error:
                raise VerificationError(f"{self.copy.name}: {error}") from error


def _apply(network: nn.Module, change: Change, verification: Verification, followers: Sequence[_Follower]) -> Undo:
    steps = [install(network, change.plan, change.tensors)]

    def undo() -> None:
        for step in reversed(steps):
            step()

    try:
        verification.check(change.exact)
        for follower in followers:
            steps.append(follower.copy.install(change.plan, follower.change.tensors))
            follower.check()
    except BaseException:
        undo()
        raise
    return undo
