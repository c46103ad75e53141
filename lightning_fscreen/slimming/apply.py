"""Remove the dead slots of a captured network, unless verification refuses."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from lightning_fscreen.modules import coupled_layers
from lightning_fscreen.slimming.blame import culprits
from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.copies import Copy
from lightning_fscreen.slimming.double import let_go
from lightning_fscreen.slimming.followers import Follower
from lightning_fscreen.slimming.interpreter import Off
from lightning_fscreen.slimming.literals import replace_sizes, take_literally, with_stale_sizes
from lightning_fscreen.slimming.operators import find_slots
from lightning_fscreen.slimming.plan import SlimmingPlan
from lightning_fscreen.slimming.planning import Change, Numbers, make_change
from lightning_fscreen.slimming.rewrite import Undo, install
from lightning_fscreen.slimming.slots import Assumption
from lightning_fscreen.slimming.state import attach
from lightning_fscreen.slimming.verify import OtherSizeError, Verification, VerificationError

log = logging.getLogger(__name__)

Agree = Callable[[SlimmingPlan], None]
"""Is called with a plan that has been carried out and verified, and undoes it by raising."""


Seen = TypeVar("Seen")

_TRIALS = 64  # until it is given up to find out which gates are to blame
_NOT_SHOWN = (
    "{0} of {0} pruned channels stay: {0} because without them the outputs would change, since forward does something "
    "that the captured graph does not show"
)


def unanimous(plan: SlimmingPlan) -> None:
    """Agree with every plan: there is nobody to ask."""


class _RehearsedError(Exception):
    """Undoes a removal that was only to be looked at."""


def rehearsed(slim: Callable[[Agree], SlimmingPlan], look: Callable[[SlimmingPlan], Seen]) -> Seen:
    """What is to be seen of a network while it is smaller; afterwards it is as it was.

    Args:
        slim: makes it smaller, if it is agreed to.
        look: plan → what is to be seen.
    """
    seen: list[Seen] = []

    def agree(plan: SlimmingPlan) -> None:
        seen.append(look(plan))
        raise _RehearsedError

    with contextlib.suppress(_RehearsedError):
        agree(slim(agree))  # nobody is asked where nothing can be removed
    return seen[0]


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
    are not zero. Where the outputs would change nevertheless, because of something that the graph does not show, it is
    found out by trying which gates are to blame; these stay, switched off.

    Args:
        network: the network.
        captured: its graph.
        args: example inputs.
        kwargs: example keyword inputs.
        off: gives gate → its units that are switched off, of the values that the network has then; see
            `Walk`. With it, train mode is verified, too.
        copies: copies of the network, which lose the same slots; each is planned and verified with its own values.
        agree: has the last word.
        round_to: number of which widths of layers become multiples, see `make_change`.

    Returns:
        The plan that was applied; false if there was nothing to remove.

    Raises:
        VerificationError: the smaller network, or a smaller copy, would not compute the same, or a copy would lose
            other slots, whatever gate loses units; network and copies are untouched then, as after an error of `agree`.
    """
    removal = _Removal(network, captured, args, kwargs, off, round_to)
    own, assumed = removal.change()
    if not own.plan:
        return own.plan
    removal.prepare(copies, look_elsewhere=bool(own.exact))
    try:
        own, undo = removal.carried_out(own, assumed)
    except VerificationError as error:
        let_go(error)
        own, undo = removal.carried_out_in_part(error)
    try:
        agree(own.plan)
    except BaseException:
        undo()
        raise
    attach(network, own.plan)
    for copy in copies:
        copy.attach(own.plan)
    return own.plan


class _Removal:
    """Tries to remove what is dead, and what of it can be where not all can.

    Args:
        network, captured, args, kwargs, off, round_to: as of `remove_dead_slots`.
    """

    def __init__(
        self,
        network: nn.Module,
        captured: Capture,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        off: Callable[[], Mapping[str, Off]] | None,
        round_to: int,
    ) -> None:
        self._network, self._captured, self._args, self._kwargs = network, captured, args, kwargs
        self._off, self._round_to = off, round_to
        self._zeros_alone = False  # whether only zeros go, of all constants
        self._staying: Collection[str] = ()  # gates that lose nothing

    def prepare(self, copies: Sequence[Copy], look_elsewhere: bool) -> None:
        """Note what network and copies compute, as long as nothing has changed.

        Args:
            copies: of the network.
            look_elsewhere: whether to do so at other sizes, too.
        """
        both = self._off is not None
        escapes = self._captured.escapes
        self._verification = Verification(self._network, self._args, self._kwargs, both, escapes)
        if look_elsewhere:
            self._verification.look_elsewhere()
        self._followers = [Follower(copy, self._network, self._args, self._kwargs, both) for copy in copies]

    def change(
        self, literal: Collection[str] = (), numbers: Numbers = "computed"
    ) -> tuple[Change, Mapping[str, Assumption]]:
        """What would be removed, and what is assumed then."""
        switched = self._off and self._off()
        free = switched and {name: own for name, own in switched.items() if name not in self._staying}
        slots = find_slots(self._network, self._captured, free, literal)
        change = make_change(self._network, slots, free, numbers, self._round_to, self._zeros_alone)
        if switched and self._staying:
            reasons = {name: _NOT_SHOWN.format(int(switched[name].pruned.sum())) for name in self._staying}
            change = replace(change, plan=replace(change.plan, kept_for=change.plan.kept_for | reasons))
        return change, slots.assumed

    def carried_out(self, own: Change, assumed: Mapping[str, Assumption]) -> tuple[Change, Undo]:
        """Carry a change out, or the same with other numbers in forward.

        Raises:
            VerificationError: neither leaves the outputs as they are.
        """
        try:
            return own, self._carry_out(own) if own.plan else _nothing
        except OtherSizeError:
            raise
        except VerificationError as error:
            if not assumed:
                raise
            let_go(error)
            log.info("sizes seem to be written into forward: %s", error)
            return take_literally(self._attempt, assumed)

    def carried_out_in_part(self, error: VerificationError) -> tuple[Change, Undo]:
        """Carry out what can be where not all can.

        Args:
            error: why not.

        Raises:
            VerificationError: that error, if nothing can.
        """
        if isinstance(error, OtherSizeError):
            log.info("constants depend on the sizes of the input: %s", error)
            self._zeros_alone = True
            try:
                return self.carried_out(*self.change())
            except VerificationError as elsewhere:
                if not isinstance(elsewhere, OtherSizeError):
                    return self._without_culprits(elsewhere)
                log.warning(
                    "the smaller network is right at the sizes of the example alone; use it at these, or slim it with "
                    "bias='zero', or on an example of the sizes that it will get: %s",
                    elsewhere,
                )
                self._verification.stay_here()
                self._zeros_alone = False
                return self.carried_out(*self.change())
        return self._without_culprits(error)

    def _without_culprits(self, error: VerificationError) -> tuple[Change, Undo]:
        """Carry it out but for the gates to blame.

        Raises:
            VerificationError: that error, if nothing can be carried out.
        """
        if not (groups := self._groups()):
            raise error
        trials = itertools.count(1)

        def works(some: Sequence[Sequence[str]]) -> bool:
            if next(trials) > _TRIALS:
                raise error
            self._staying = {name for names in groups for name in names}.difference(*some)
            return self._works()

        self._staying = culprits(groups, works)
        own, assumed = self.change()
        if not own.plan:
            raise error
        result = self.carried_out(own, assumed)
        name, staying = type(self._network).__name__, sorted(self._staying)
        log.warning(
            "units of %s stay in %s, switched off: forward does something that its graph lacks (it divides by the "
            "square root of a width, say); leave these layers out with exclude, or write that with a fixed number",
            staying,
            name,
        )
        return result

    def _groups(self) -> list[list[str]]:
        """Gates that are switched off, in part; those that can only go together in lists of their own."""
        switched = {name: own for name, own in (self._off() if self._off else {}).items() if bool(own.pruned.any())}
        slots = find_slots(self._network, self._captured, self._off and self._off())
        root = slots.components()
        gates = {**slots.gates, **{name: own.labels for name, own in slots.heads.items()}}
        units = {name: (root[gates[name]] - 1).tolist() for name in switched if name in gates}  # what is pinned is −1
        return coupled_layers(units)

    def _works(self) -> bool:
        """Whether it works if those gates lose their units that need not stay."""
        try:
            _, undo = self.carried_out(*self.change())
        except VerificationError as error:
            let_go(error)
            if isinstance(error, OtherSizeError) and not self._zeros_alone:  # that is no fault of theirs
                self._zeros_alone = True
                return self._works()
            return False
        undo()
        return True

    def _carry_out(self, own: Change, literal: Collection[str] = (), numbers: Numbers = "computed") -> Undo:
        for follower in self._followers:
            follower.plan(lambda: replace_sizes(self.change(literal, numbers)[0], own.plan.sizes), own)
        return _apply(self._network, own, self._verification, self._followers)

    def _attempt(self, literal: Collection[str], numbers: Numbers) -> tuple[Change, Undo]:
        own, _ = self.change(literal, numbers)
        own = with_stale_sizes(self._network, own, self._rehearse)
        return own, self._carry_out(own, literal, numbers) if own.plan else _nothing

    def _rehearse(self) -> None:
        self._verification.rehearse(self._args, self._kwargs, self._captured.training)


def _nothing() -> None:
    """Undo nothing."""


def _apply(network: nn.Module, change: Change, verification: Verification, followers: Sequence[Follower]) -> Undo:
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
