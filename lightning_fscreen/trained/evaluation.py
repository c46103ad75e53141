"""A metric of a network as one number, with modes and random numbers as before."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_fscreen.modules import evaluating
from lightning_fscreen.randomness import same_random_numbers
from lightning_fscreen.statistics.labels import describe
from lightning_fscreen.statistics.one_pass import Forward, call, device_of

Measure = Callable[[nn.Module, Any], Any] | Metric
"""(model, dataloader) → a number, higher is better; or a metric of torchmetrics over outputs and labels, which says
itself what is better."""


class Evaluation:
    """Evaluates one metric of one model on the same batches again and again.

    The model is in eval mode then, without gradients. Every evaluation begins with the same random numbers.

    Args:
        model: the model.
        metric: see `Measure`; one of torchmetrics is copied, not updated.
        dataloader: the batches.
        labels: batch → labels, for metrics of torchmetrics.
        forward: runs the model on a batch, likewise.

    Raises:
        ValueError: no metric, or one of torchmetrics that does not say whether higher is better; batches that can be
            read only once.
    """

    def __init__(
        self,
        model: nn.Module,
        metric: Measure,
        dataloader: Iterable[Any],
        labels: Callable[[Any], Tensor],
        forward: Forward | None,
    ) -> None:
        if not callable(metric):
            raise ValueError(f"metric must be a function (model, dataloader) → float, or a Metric, got {metric!r}")
        better = metric.higher_is_better if isinstance(metric, Metric) else True
        if better is None:
            raise ValueError(
                f"{type(metric).__name__} does not say whether higher is better (higher_is_better is None); give a "
                "function (model, dataloader) → float, higher is better"
            )
        if isinstance(dataloader, Iterator):
            raise ValueError(
                f"the metric needs its batches again and again, but a {type(dataloader).__name__} gives them once; "
                "give a DataLoader or a list"
            )
        self._model, self._metric, self._dataloader = model, metric, dataloader
        self._labels, self._forward, self._sign = labels, forward, 1 if better else -1

    def __call__(self, what: str) -> float:
        """The metric of the model as it is now.

        Args:
            what: that is called in messages.

        Raises:
            ValueError: it is no finite number.
        """
        with evaluating(self._model), torch.no_grad(), same_random_numbers():
            value = self._over_batches(self._metric) if isinstance(self._metric, Metric) else self._call(self._metric)
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:  # a tensor of several elements raises the last
            raise ValueError(f"the metric of {what} must be a number, but it is {describe(value)}") from error
        if not math.isfinite(number):
            raise ValueError(f"the metric of {what} is {number}; it must be a finite number")
        return number

    def drop(self, before: float, after: float) -> float:
        """By how much the metric has become worse."""
        return self._sign * (before - after)

    def _call(self, metric: Callable[[nn.Module, Any], Any]) -> Any:
        return metric(self._model, self._dataloader)

    def _over_batches(self, metric: Metric) -> Any:
        device = device_of(self._model)
        metric = copy.deepcopy(metric).to(device)
        metric.reset()
        for batch in self._dataloader:
            batch = move_data_to_device(batch, device)
            given = self._labels(batch)
            metric.update(call(self._model, batch, given, self._forward), given)
        if not metric.update_called:
            raise ValueError("the dataloader of the metric is empty: check the data set, batch_size and drop_last")
        return metric.compute()
