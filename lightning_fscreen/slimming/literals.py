"""Sizes that a forward has written into it as numbers: whether they can follow, and which lines have those that cannot.

Sizes in a graph are numbers, whether forward computes them from the shape of its input or not. They are taken for
computed, until the smaller network does not run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import get_args

from torch import nn

from lightning_fscreen.slimming.double import let_go
from lightning_fscreen.slimming.planning import Change, Numbers
from lightning_fscreen.slimming.rewrite import Undo, install
from lightning_fscreen.slimming.sizes import Sizes, stale_sizes
from lightning_fscreen.slimming.slots import Assumption
from lightning_fscreen.slimming.verify import VerificationError

log = logging.getLogger(__name__)


def take_literally(
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


def with_stale_sizes(network: nn.Module, change: Change, rehearse: Callable[[], None]) -> Change:
    """The change, with those of its sizes that do not follow by themselves.

    Raises:
        VerificationError: the smaller network does not run.
    """
    if not change.plan.sizes:
        return change
    undo = install(network, replace(change.plan, sizes={}), change.tensors)
    try:
        return replace_sizes(change, stale_sizes(network, change.plan.sizes, rehearse))
    except Exception as error:  # whatever forward raises
        let_go(error)
        raise VerificationError(f"forward of {type(network).__name__} fails on the smaller network: {error}") from error
    finally:
        undo()


def replace_sizes(change: Change, sizes: Sizes) -> Change:
    """A change with other sizes."""
    return replace(change, plan=replace(change.plan, sizes=sizes))
