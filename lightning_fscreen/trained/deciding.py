"""What goes under one amount; of a latency, after the smaller network was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_fscreen.candidates.costs import Currency
from lightning_fscreen.ranking.amounts import Amount
from lightning_fscreen.trained.one_shot import Choice, OneShot

_ATTEMPTS = 5
_CLOSE = 0.03  # as a share of what is wanted, near enough to try no further


def decide(found: OneShot, amount: Amount, budget: Currency) -> Choice:
    """As `OneShot.choose`; but a latency is measured, and asked for again where it was missed.

    The sum over operations, by which masks are chosen, misses what they cost each other. The choice whose network comes
    nearest is taken, out of five at most.

    Args:
        found: the model and its candidates.
        amount: what goes.
        budget: of what.

    Raises:
        ValueError: as `OneShot.choose`; a latency that cannot be met, as far as is measured.
        VerificationError: as `OneShot.rehearse`.
    """
    if budget != "latency" or isinstance(amount, Mapping) or not amount:
        return found.choose(amount)
    missed, less, more = dict[float, tuple[float, Choice]](), (0.0, 0.0), (math.inf, math.inf)
    asked = amount
    for _ in range(_ATTEMPTS):
        most = max(found.most(), 0.0)  # after each measurement it is another
        asked = min(asked, most)
        choice = found.choose(asked)
        gone = 1 - found.latency_under(choice)
        missed[abs(gone - amount)] = gone, choice
        if min(missed) <= _CLOSE * (1 - amount) or (gone < amount and asked == most):
            break
        less, more = (less, (asked, gone)) if gone > amount else ((asked, gone), more)
        if math.isfinite(more[1]):
            asked = less[0] + (amount - less[1]) * (more[0] - less[0]) / (more[1] - less[1])
        else:
            asked = asked * amount / max(gone, amount / 2)
    gone, choice = missed[min(missed)]
    if asked == most and math.isinf(more[1]) and gone < amount - _CLOSE * (1 - amount):
        raise ValueError(
            f"amount={amount:.4g} of the latency cannot go: without all units that can go the network still takes "
            f"{1 - gone:.2%} of its time; lower amount to {max(gone, 0):.4g} or less, or the floor"
        )
    return choice._replace(amount=amount)
