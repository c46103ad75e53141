"""How much has to be pruned by when."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_fscreen.ranking.schedule import Schedule, scheduled_fraction
from lightning_fscreen.ranking.window import Window


@dataclass
class Budget:
    """The pruned fraction that a schedule asks for, position by position (completed epochs, or steps).

    Attributes:
        amount: fraction of the candidates pruned in the end.
        schedule: progress ∈ [0, 1] → fraction of the amount.
        window: where it is pruned.
        total: number of candidates.
        target: how many of them should be pruned by now. Units of several candidates may fall short of it by a few.
        closed: nothing more is pruned, because the network has been made smaller.
    """

    amount: float
    schedule: Schedule
    window: Window
    total: int = 0
    target: int = 0
    closed: bool = False

    def fraction(self, position: int) -> float:
        """Fraction of the candidates that are pruned at a position."""
        return self.amount * scheduled_fraction(self.schedule, position, self.window.start, self.window.end)

    def asks_for_more(self, position: int) -> bool:
        """Whether more is to be pruned at a position than is pruned now."""
        return not self.closed and self._number(position) > self.target

    def met(self, position: int) -> None:
        """The number for a position has been pruned."""
        self.target = max(self.target, self._number(position))

    @property
    def falls_short(self) -> bool:
        """Whether the budget was closed before the whole amount was pruned."""
        return self.closed and self._number(self.window.end) > self.target

    def _number(self, position: int) -> int:
        return round(self.fraction(position) * self.total)
