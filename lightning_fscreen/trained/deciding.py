"""What goes under one amount; of a latency, after the smaller network was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_fscreen.candidates.costs import Currency
from lightning_fscreen.ranking.amounts import Amount
from lightning_fscreen.trained.one_shot import Choice, OneShot

_ATTEMPTS = 3
_CLOSE = 0.03  # as a share of what is wanted, near enough to try no further


def decide(found: OneShot, amount: Amount, budget: Currency) -> Choice:
    """As `OneShot.choose`; but a latency is measured, and asked for again where it was missed.

    The sum over operations, by which masks are chosen, misses what they cost each other. The choice whose network comes
    nearest is taken, out of three at most.

    Args:
        found: the model and its candidates.
        amount: what goes.
        budget: of what.

    Raises:
        ValueError: as `OneShot.choose`.
        VerificationError: as `OneShot.rehearse`.
    """
    choice = found.choose(amount)
    if budget != "latency" or isinstance(amount, Mapping) or not amount:
        return choice
    asked, missed, less, more = amount, dict[float, Choice](), (0.0, 0.0), (found.most(), math.inf)
    for attempt in range(_ATTEMPTS):
        gone = 1 - found.latency_under(choice)
        missed[abs(gone - amount)] = choice
        if attempt == _ATTEMPTS - 1 or abs(gone - amount) <= _CLOSE * (1 - amount):
            break
        less, more = (less, (asked, gone)) if gone > amount else ((asked, gone), more)
        if math.isfinite(more[1]):
            asked = less[0] + (amount - less[1]) * (more[0] - less[0]) / (more[1] - less[1])
        else:
            asked = min(asked * amount / max(gone, amount / 2), more[0])
        asked = min(asked, found.most())  # which was measured again, and may be less than it was
        choice = found.choose(asked)
    return missed[min(missed)]._replace(amount=amount)
