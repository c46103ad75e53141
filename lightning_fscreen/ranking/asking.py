"""What to ask for, so that what comes of it is what was wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Result = TypeVar("Result")

_ATTEMPTS = 5
_CLOSE = 0.03  # as a share of what is to be left, near enough to try no further


@dataclass(frozen=True)
class Answer(Generic[Result]):
    """The attempt that came nearest.

    Attributes:
        result: of it.
        share: what it gave.
        is_most: whether all was asked for, and it gave too little.
    """

    result: Result
    share: float
    is_most: bool


def too_much(amount: float, most: float) -> str:
    """What to say of a latency that cannot be met; `most`, the share that goes at most, as measured."""
    return (
        f"amount={amount:.4g} of the latency cannot go: without all units that can go the network still takes "
        f"{1 - most:.2%} of its time; lower amount to {max(most, 0):.4g} or less, or the floor"
    )


def ask_for(
    wanted: float,
    most: Callable[[], float],
    attempt: Callable[[float], tuple[float, Result]],
    first: float | None = None,
) -> Answer[Result]:
    """Ask for a share, again where another came of it, five times at most: in proportion, then between two others.

    Args:
        wanted: the share.
        most: that can be asked for, as far as is known before each attempt.
        attempt: share that is asked for → the share that comes of it, and the result.
        first: what to ask for first; by default what is wanted.
    """
    missed, less, more = dict[float, tuple[float, Result]](), (0.0, 0.0), (math.inf, math.inf)
    asked = wanted if first is None else first
    for _ in range(_ATTEMPTS):
        limit = max(most(), 0.0)
        asked = min(asked, limit)
        share, result = attempt(asked)
        missed[abs(share - wanted)] = share, result
        if min(missed) <= _CLOSE * (1 - wanted) or (share < wanted and asked == limit):
            break
        less, more = (less, (asked, share)) if share > wanted else ((asked, share), more)
        if math.isfinite(more[1]):
            asked = less[0] + (wanted - less[1]) * (more[0] - less[0]) / (more[1] - less[1])
        else:
            asked = asked * wanted / max(share, wanted / 2)
    share, result = missed[min(missed)]
    is_most = asked == limit and math.isinf(more[1]) and share < wanted - _CLOSE * (1 - wanted)
    return Answer(result, share, is_most)
