"""`FStatistic`: the F-statistic of a stream of batches as a torchmetrics Metric."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_fscreen.functional import (
    ClassSums,
    accumulate_,
    check_labels,
    check_num_classes,
    f_statistic_compute,
    f_statistic_merge,
)


class FStatistic(Metric):
    """One-way ANOVA F-statistic of `num_features` features, updated batch by batch.

    Equal to `functional.f_statistic` over all instances at once, however they are split into batches and processes
    (Eq. 3 and 4, arXiv 2502.07189). Memory is (C + 2)·p float64 numbers, whatever the number of instances.

    Args:
        num_features: p.
        num_classes: C.
        kwargs: as every `torchmetrics.Metric`.

    Raises:
        ValueError: num_features < 1 or num_classes < 2.

    Example:
        >>> import torch
        >>> metric = FStatistic(num_features=2, num_classes=2)
        >>> metric.update(torch.tensor([[0.0, 1.0], [1.0, 3.0], [4.0, 1.0]]), torch.tensor([0, 0, 1]))
        >>> metric.update(torch.tensor([[5.0, 3.0]]), torch.tensor([1]))
        >>> metric.compute()
        tensor([32.,  0.], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    shift: Tensor
    counts: Tensor
    sums: Tensor
    squares: Tensor

    def __init__(self, num_features: int, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        check_num_classes(num_classes)
        self.num_features = num_features
        self.num_classes = num_classes
        self._scratch: Tensor | None = None
        # dist_reduce_fx=None: processes measure from different shifts, so their states are stacked, and merged later.
        for name, shape in (
            ("shift", (num_features,)),
            ("counts", (num_classes,)),
            ("sums", (num_classes, num_features)),
            ("squares", (num_features,)),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx=None)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: (N, num_features), any dtype.
            labels: (N,) class indices or (N, num_classes) class weights.

        Raises:
            ValueError: wrong shapes, labels out of range.
        """
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(f"features must have shape (N, {self.num_features}), got {tuple(features.shape)}")
        if len(features) == 0:
            return
        check_labels(labels, self.num_classes)
        if len(features) != len(labels):
            raise ValueError(f"features and labels differ in length: {len(features)} and {len(labels)}")
        if self.counts.ndim > 1:  # synchronised before
            self._set(self._merged())
        if not bool(self.counts.any()):
            self.shift.copy_(features[0])
        sums = ClassSums(self.shift, self.counts, self.sums, self.squares)
        self._scratch = accumulate_(sums, features, labels, self._scratch)

    def compute(self) -> Tensor:
        """(num_features,) float64; see `functional.f_statistic` for constant features and the errors raised."""
        return f_statistic_compute(self._merged())

    def plot(self, val: Tensor | None = None, ax: Any = None) -> Any:
        """Bar chart of F by feature.

        Args:
            val: (num_features,) what `compute` returned; computed if None.
            ax: a matplotlib axis to draw on; a new figure if None.

        Returns:
            (figure, axis), as every torchmetrics plot.
        """
        import matplotlib.pyplot as plt

        values = self.compute() if val is None else val
        figure, ax = (ax.get_figure(), ax) if ax is not None else plt.subplots()
        ax.bar(range(len(values)), values.detach().cpu().numpy(), width=1.0)
        ax.set_xlabel("feature")
        ax.set_ylabel("F-statistic")
        return figure, ax

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_scratch": None}

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another `FStatistic`, or its state, has seen.

        Raises:
            ValueError: it is of another kind or size.
        """
        if isinstance(incoming_state, FStatistic):
            incoming_state = incoming_state.metric_state
        elif isinstance(incoming_state, Metric):
            raise ValueError(f"an FStatistic can only merge with an FStatistic, got {type(incoming_state).__name__}")
        classes, features = _state(incoming_state).sums.shape[-2:]
        if (classes, features) != (self.num_classes, self.num_features):
            raise ValueError(
                f"an FStatistic of {self.num_classes} classes and {self.num_features} features cannot merge with one "
                f"of {classes} and {features}"
            )
        self._reduce_states(incoming_state)
        self._update_count += 1
        self._computed = None

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        self._set(f_statistic_merge(_merge_processes(_state(incoming_state)), self._merged()))

    def _merged(self) -> ClassSums:
        return _merge_processes(ClassSums(self.shift, self.counts, self.sums, self.squares))

    def _set(self, sums: ClassSums) -> None:
        self.shift, self.counts, self.sums, self.squares = sums

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def keep_shape(*args: Any, **kwargs: Any) -> Tensor:
            f: Tensor = wrapped(*args, **kwargs)
            return f.reshape(self.num_features)  # torchmetrics squeezes a single feature

        return keep_shape

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> FStatistic:
        # Follow the module to its device, not to its dtype: sums in half precision would be worthless.
        self._scratch = None
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), *args, **kwargs)
        return self


def _state(state: dict[str, Any]) -> ClassSums:
    return ClassSums(*(state[name] for name in ClassSums._fields))


def _merge_processes(sums: ClassSums) -> ClassSums:
    """Undo the leading (world size,) dimension that torchmetrics' synchronisation stacks the states along."""
    if sums.shift.ndim == 1:
        return sums
    return functools.reduce(f_statistic_merge, (ClassSums(*part) for part in zip(*sums, strict=True)))
