"""What goes under one amount; of a latency, after the smaller network was measured."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_fscreen.candidates.costs import Currency
from lightning_fscreen.ranking.amounts import Amount
from lightning_fscreen.ranking.asking import ask_for, too_much
from lightning_fscreen.trained.one_shot import Choice, OneShot


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

    def attempt(asked: float) -> tuple[float, Choice]:
        choice = found.choose(asked)
        return 1 - found.latency_under(choice), choice

    answer = ask_for(amount, found.most, attempt)  # what can go at most is another after each measurement
    if answer.is_most:
        raise ValueError(too_much(amount, answer.share))
    return answer.result._replace(amount=amount)
