"""`amount="auto"`: the largest amount under which a metric drops no further than it may."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_fscreen.statistics.one_pass import Forward
from lightning_fscreen.trained.evaluation import Evaluation, Measure
from lightning_fscreen.trained.one_shot import Choice, OneShot

log = logging.getLogger(__name__)

MAX_DROP = 0.01
EVALUATIONS = 10


class Limit:
    """How far a metric may drop below that of the network as it is.

    Args:
        evaluation: of the metric; called once.
        max_drop: in the metric's own unit.

    Raises:
        ValueError: `max_drop` is no finite number ≥ 0; the metric is no finite number.
    """

    def __init__(self, evaluation: Evaluation, max_drop: float) -> None:
        if not 0 <= max_drop < math.inf:
            raise ValueError(f"max_drop must be a finite number of at least 0, got {max_drop}")
        self._evaluation, self._max_drop = evaluation, max_drop
        self._before = evaluation("the network as it is")

    def largest(self, found: OneShot, progress: bool) -> Choice:
        """The largest amount within the limit, by bisection, and what goes under it.

        The drop right after pruning, of the masked network, is taken to grow with the amount. Ten evaluations leave
        1/1024 of the largest amount that the floors allow.

        Args:
            found: the network with its statistics.
            progress: show a progress bar.

        Raises:
            ValueError: the metric is no finite number; nothing has changed then.
        """
        low, high = 0.0, found.most()
        best = found.choose(low)
        for _ in tqdm(range(EVALUATIONS), desc="amount", unit="evaluation", disable=not progress):
            middle = (low + high) / 2
            choice = found.choose(middle)
            with found.masked(choice.kept):
                metric = self._evaluation(f"the network with amount={middle:.4g} masked")
            log.info("amount=%.4g: the metric goes from %g to %g", middle, self._before, metric)
            if self._evaluation.drop(self._before, metric) <= self._max_drop:
                low, best = middle, choice
            else:
                high = middle
        if low == 0:
            warnings.warn(
                f"nothing was pruned: already with amount={high:.2g} the metric drops by more than "
                f"max_drop={self._max_drop:g}",
                stacklevel=3,
            )
        return best


def limit_of(
    model: nn.Module,
    auto: bool,
    metric: Measure | None,
    val_dataloader: Iterable[Any] | None,
    max_drop: float,
    labels: Callable[[Any], Tensor],
    forward: Forward | None,
) -> Limit | None:
    """The limit, with `auto`; otherwise None.

    Raises:
        ValueError: with `auto`, no metric or no batches for it; otherwise, arguments that are for `auto`.
    """
    if not auto:
        if metric is not None or val_dataloader is not None or max_drop != MAX_DROP:
            raise ValueError('metric, val_dataloader and max_drop are for amount="auto"; leave them out, or set that')
        return None
    if metric is None or val_dataloader is None:
        raise ValueError(
            'amount="auto" needs metric=, and val_dataloader= with batches that the ranking has not seen to evaluate '
            f"it on, got metric={metric!r} and val_dataloader={val_dataloader!r}"
        )
    return Limit(Evaluation(model, metric, val_dataloader, labels, forward), max_drop)
