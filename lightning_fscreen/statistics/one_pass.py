"""Statistics of a network's activations in one pass over the data, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_fscreen.modules import evaluating
from lightning_fscreen.statistics.collector import ActivationCollector
from lightning_fscreen.statistics.labels import class_labels, describe, find_labels, warn_of_choice
from lightning_fscreen.statistics.padding import find_tokens
from lightning_fscreen.statistics.second_moments import SecondMoments

Forward = Callable[[nn.Module, Any], Any]
"""(model, batch) → anything, runs the model."""


def observe(
    model: nn.Module,
    dataloader: Iterable[Any],
    make_collector: Callable[[Tensor], ActivationCollector] | None,
    labels: Callable[[Any], Tensor],
    forward: Forward | None = None,
    progress: bool = True,
    title: str = "screening",
    moments: SecondMoments | None = None,
) -> ActivationCollector | None:
    """Sums over the activations of all batches, in eval mode and without gradients; padding does not count.

    Args:
        model: the model; on the device of its parameters.
        dataloader: batches; consumed once.
        make_collector: labels of the first batch → what sums the activations. None if nothing does; then no labels are
            needed.
        labels: batch → class indices (N,) or class weights (N, C).
        forward: runs the model; by default calls it with the batch's first item, or with what is not the labels.
        progress: show a progress bar.
        title: of that.
        moments: gathered along with these.

    Raises:
        ValueError: an empty loader, labels not found or out of range, NaN or inf activations.
    """
    collector: ActivationCollector | None = None
    device, empty = device_of(model), True
    try:
        # Compiled graphs do not see hooks that came after them.
        with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for batch in tqdm(dataloader, desc=title, unit="batch", disable=not progress):
                batch, empty = move_data_to_device(batch, device), False
                given, tokens = labels_of(batch, labels, make_collector is not None), find_tokens(batch)
                if make_collector is not None and given is not None:
                    batch_labels = class_labels(given)
                    if collector is None:
                        collector = make_collector(batch_labels)
                        if labels is find_labels:
                            warn_of_choice(batch, given, collector.num_classes)
                    collector.attach(tokens)
                with nullcontext() if moments is None else moments.counting(tokens):
                    call(model, batch, given, forward)
                if collector is not None:
                    collector.remove()
                    collector.update(batch_labels)
    finally:
        if collector is not None:
            collector.remove()
    if empty:
        raise ValueError(EMPTY)
    return collector


def labels_of(batch: Any, labels: Callable[[Any], Tensor], required: bool) -> Tensor | None:
    """The labels of a batch; None if it has none and they are not required.

    Raises:
        ValueError: they are, and are not found.
    """
    try:
        return labels(batch)
    except ValueError:
        if required:
            raise
        return None


EMPTY = "the dataloader is empty: no batch to screen; check the data set, batch_size and drop_last"


def device_of(model: nn.Module) -> torch.device:
    """Device of its first parameter."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def call(model: nn.Module, batch: Any, labels: Tensor | None, forward: Forward | None = None) -> Any:
    """Run a model on a batch.

    Raises:
        ValueError: its input cannot be told from the batch.
    """
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):
        inputs = {key: value for key, value in batch.items() if value is not labels}
        return model(next(iter(inputs.values()))) if len(inputs) == 1 else model(**inputs)
    if isinstance(batch, Sequence):
        return model(batch[0])
    if labels is None and isinstance(batch, Tensor):
        return model(batch)
    raise ValueError(f"cannot tell the model's input in the batch: {describe(batch)}; pass forward=")
