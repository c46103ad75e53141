"""What a fit has come to: plan, masks, report, window."""

from __future__ import annotations

from torch import Tensor

from lightning_fscreen.fit.hooks import TrainingHooks
from lightning_fscreen.fit.phases import Phase
from lightning_fscreen.fit.report import PruningReport
from lightning_fscreen.ranking.window import Unit
from lightning_fscreen.slimming import SlimmingPlan


class Results(TrainingHooks):
    """The part of `ScreeningPruningCallback` that others read during a fit and after it."""

    @property
    def fine_tuning(self) -> bool:
        """Whether the whole amount is pruned, and the remaining network is being trained."""
        return self._progress.phase is Phase.FINE_TUNING

    @property
    def total_amount(self) -> float:
        """Fraction pruned in the end, of all candidates together where amounts differ by layer."""
        return self._budget.amount

    @property
    def plan(self) -> SlimmingPlan | None:
        """The channels and units removed, from the network and its copies in the module; None before slimming."""
        return self._pruner.plan if self._pruner is not None else None

    @property
    def window(self) -> tuple[int, int]:
        """First epoch or step (`window_unit`) of the annealing window, and first one after it; of the last fit."""
        return self._budget.window.start, self._budget.window.end

    @property
    def window_unit(self) -> Unit:
        """What the window counts: "epoch" or "step"."""
        return self._budget.window.unit

    @property
    def masks(self) -> dict[str, Tensor]:
        """Boolean masks of the candidates by layer, at their size before slimming, True where kept."""
        return dict(self._pruner.masks.kept) if self._pruner is not None else {}

    def report(self) -> PruningReport:
        """The candidates and sizes before and now.

        Raises:
            RuntimeError: no fit has started yet.
        """
        if self._pruner is None:
            raise RuntimeError("there is nothing to report before Trainer.fit has started with this callback")
        return self._pruner.report()
