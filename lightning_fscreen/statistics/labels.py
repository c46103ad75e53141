"""Find the labels in a batch, and the number of classes, the way classifiers usually carry them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

log = logging.getLogger(__name__)

_TOLERANCE = 0.02  # of a sum of proportions in bfloat16
_WAYS = (
    "Pass labels=, a function of the batch that returns one class index per instance (N,) or class weights (N, C); or "
    'let a ScreeningPruningCallback rank without classes: criterion="magnitude" or "taylor" need no labels (except for '
    'bias="mean")'
)
_KEYS = ("label", "labels", "target", "targets", "y")


def find_labels(batch: Any) -> Tensor:
    """Labels of a batch: the second item of (x, y, …), or the entry of a mapping or object named label, target, y, ….

    Raises:
        ValueError: none found; the message describes the batch and says how to pass `labels=`.
    """
    found: Any = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _KEYS if key in batch), None)
    elif named := next((key for key in _KEYS if key in getattr(batch, "_fields", ())), None):
        found = getattr(batch, named)
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        found = batch[1] if len(batch) > 1 else None
        if isinstance(found, Mapping):
            found = next((found[key] for key in _KEYS if key in found), None)
    elif not isinstance(batch, Tensor):
        found = next((getattr(batch, key) for key in _KEYS if hasattr(batch, key)), None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"no labels found in the batch: {describe(batch)}. Labels are looked for in (x, y), in mappings and in "
            f"attributes named {', '.join(_KEYS)}. {_WAYS}. For instance labels=lambda batch: batch['class']"
        )
    return found


def warn_of_choice(batch: Any, labels: Tensor, num_classes: int) -> None:
    """Warn where a later item of a batch (x, y, …) could be the labels as well as its second one.

    A category among the inputs, (numbers, category, label), looks like labels; an index, weights or lengths do not.
    """
    if not isinstance(batch, Sequence) or len(batch) < 3 or batch[1] is not labels:
        return
    for place, item in enumerate(batch[2:], 2):
        alike = isinstance(item, Tensor) and item.shape == labels.shape and item.dtype == labels.dtype
        if alike and bool(((item >= 0) & (item < num_classes)).all()):
            log.warning(
                "labels are taken from the second item of the batch, but item %d looks like labels of %d classes, too: "
                "%s. If it is, pass labels=lambda batch: batch[%d]; if not, labels=lambda batch: batch[1] says so",
                *(place + 1, num_classes, describe(batch), place),
            )
            return


def class_labels(labels: Tensor) -> Tensor:
    """The ways to write one class per instance as class indices (N,) or class weights (N, C).

    Columns (N, 1) of integers become (N,), booleans the weights (N, 2) of two classes; integer or boolean one-hot rows
    (N, C) become class weights, whose values `check_proportions` looks at.

    Raises:
        ValueError: labels of another form, or no tensor; says what they may be, and what to do.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels= returned no tensor but {describe(labels)}. {_WAYS}")
    if labels.ndim == 2 and labels.shape[1] == 1 and not labels.is_floating_point():
        labels = labels.squeeze(1)
    if labels.ndim == 1 and labels.dtype == torch.bool:
        return torch.stack([~labels, labels], 1).float()
    if labels.ndim == 2 and labels.shape[1] > 1:
        return labels if labels.is_floating_point() else labels.float()
    if labels.ndim == 1 and not labels.is_floating_point():
        return labels
    if labels.ndim == 0:
        reading = "one value for the whole batch"
    elif labels.ndim > 2:
        reading = "a value for every position (segmentation), or images"
    else:
        reading = (
            "numbers (regression, or one logit); if they are 0 and 1 for two classes, say so by "
            "labels=lambda batch: batch[1].flatten().long() and num_classes=2"
        )
    raise ValueError(
        f"the labels, {describe(labels)}, are not one class per instance: they look like {reading}. {_WAYS}"
    )


def check_proportions(labels: Tensor) -> None:
    """Check that class weights (N, C) are proportions: every row sums to one, up to the rounding of half precision.

    Raises:
        ValueError: they are not, so that they may mean something else than classes.
    """
    if not labels.is_floating_point() or labels.ndim != 2:
        return
    sums = labels.double().sum(1)
    wrong = ((sums - 1).abs() > _TOLERANCE).nonzero()
    if len(wrong):
        row = int(wrong[0])
        found = f"sums to {float(sums[row]):.4g}" if labels[row].any() else "is all zero, an instance without a class"
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} can be read as proportions of classes (one-hot, mixup, label "
            f"smoothing) only if every row sums to 1, but row {row} {found}. Several labels per instance, boxes, "
            f"tokens and regression targets are no classes. {_WAYS}"
        )


def describe(value: Any, depth: int = 0) -> str:
    """A short account of a nested batch: types, shapes and dtypes, no values."""
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if depth == 2:
        return type(value).__name__
    if isinstance(value, Mapping):
        items = [f"{key!r}: {describe(item, depth + 1)}" for key, item in list(value.items())[:8]]
        return f"{type(value).__name__} {{{', '.join(items)}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = [describe(item, depth + 1) for item in value[:8]]
        return f"{type(value).__name__} of {len(value)} ({', '.join(items)})"
    return type(value).__name__


def find_num_classes(*sources: Any, labels: Tensor | None = None) -> int:
    """As `infer_num_classes`.

    Raises:
        ValueError: none of the sources knows it.
    """
    found = infer_num_classes(*sources, labels=labels)
    if found is None:
        kinds = " and ".join(type(source).__name__ for source in sources if source is not None)
        raise ValueError(
            f"the number of classes cannot be found: {kinds} has no attribute, hyperparameter or metric with "
            "num_classes, and no last linear layer with an output for every class. Pass num_classes=, for instance "
            'num_classes=2 for one logit; to rank without classes use criterion="magnitude" or "taylor"'
        )
    return found


def infer_num_classes(*sources: Any, labels: Tensor | None = None) -> int | None:
    """Number of classes, from class weights (N, C), or from the first source that knows it.

    A source knows it through an attribute or hyperparameter `num_classes`, or a torchmetrics metric with one. As a last
    resort, the width of the last linear layer of a source that is a module (a label beyond it is an error later on).
    """
    if labels is not None and labels.is_floating_point() and labels.ndim == 2:
        return labels.shape[1]
    for source in sources:
        hparams = getattr(source, "hparams", None)
        candidates = [getattr(source, "num_classes", None), getattr(hparams, "num_classes", None)]
        candidates += [hparams.get("num_classes")] if isinstance(hparams, Mapping) else []
        if isinstance(source, nn.Module):
            metrics = (module for module in source.modules() if isinstance(module, Metric))
            candidates += [getattr(metric, "num_classes", None) for metric in metrics]
        for candidate in candidates:
            if isinstance(candidate, int) and candidate > 1:
                return candidate
    for source in sources:
        if isinstance(source, nn.Module):
            widths = [module.out_features for module in source.modules() if isinstance(module, nn.Linear)]
            if widths and widths[-1] > 1:
                return widths[-1]
    return None
