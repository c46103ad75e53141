"""How much has to be pruned by when."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_fscreen.ranking.schedule import Schedule, scheduled_fraction


@dataclass
class Budget:
    """The pruned fraction that a schedule asks for, epoch by epoch.

    Attributes:
        amount: fraction of the candidates pruned in the end.
        schedule: progress ∈ [0, 1] → fraction of the amount.
        window: first epoch of the annealing window, and first epoch after it.
        total: number of candidates.
        target: how many of them should be pruned by now. Units of several candidates may fall short of it by a few.
        closed: nothing more is pruned, because the network has been made smaller.
    """

    amount: float
    schedule: Schedule
    window: tuple[int, int]
    total: int = 0
    target: int = 0
    closed: bool = False

    def fraction(self, epoch: int) -> float:
        """Fraction of the candidates pruned at the end of an epoch."""
        return self.amount * scheduled_fraction(self.schedule, epoch + 1, *self.window)

    def asks_for_more(self, epoch: int) -> bool:
        """Whether the end of an epoch is to prune more than is pruned now."""
        return not self.closed and self._number(epoch) > self.target

    def met(self, epoch: int) -> None:
        """The number for the end of an epoch has been pruned."""
        self.target = max(self.target, self._number(epoch))

    @property
    def falls_short(self) -> bool:
        """Whether the budget was closed before the whole amount was pruned."""
        return self.closed and self._number(self.window[1]) > self.target

    def _number(self, epoch: int) -> int:
        return round(self.fraction(epoch) * self.total)
