"""`screen`: F-statistics of a whole network in one pass over the data, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_fscreen.functional import check_num_classes
from lightning_fscreen.modules import select, uncompiled
from lightning_fscreen.statistics.collector import ActivationCollector
from lightning_fscreen.statistics.labels import find_labels, find_num_classes
from lightning_fscreen.statistics.one_pass import Forward, observe
from lightning_fscreen.statistics.probes import Probe


def screen(
    model: nn.Module,
    dataloader: Iterable[Any],
    num_classes: int | None = None,
    *,
    labels: Callable[[Any], Tensor] = find_labels,
    forward: Forward | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """F-statistic of every gate and of every input of every linear and convolution layer, in one pass.

    An activation counts with its mean over positions. The model runs in eval mode, without gradients, on the device of
    its parameters; modes and hooks are as before afterwards.

    Args:
        model: any module.
        dataloader: batches; consumed once.
        num_classes: number of classes; if None, looked for in the model (`num_classes`, the last linear layer).
        labels: batch → class indices (N,) or class weights (N, C); by default found in (x, y), dicts, ….
        forward: (model, batch) → anything, runs the model; by default calls it with the batch's first item (or the
            item that is not the labels).
        include: glob patterns over module names, one of which a layer must match.
        exclude: glob patterns over module names, none of which a layer may match.
        progress: show a progress bar.

    Returns:
        Batch-norm layers → (channels,), F of their output; linear and convolution layers → (inputs,), F of their input.
        On the model's device, float64.

    Raises:
        ValueError: an empty loader, labels not found or out of range, patterns that match nothing, nothing to screen,
            NaN or inf activations (names the layer and the batch), a layer that never runs.
    """
    check_num_classes(num_classes)
    model = uncompiled(model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | _ConvNd | _BatchNorm)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
    }
    left_out = select(layers, include, exclude)
    probes = [
        Probe(name, module, "output" if isinstance(module, _BatchNorm) else "input")
        for name, module in layers.items()
        if name not in left_out
    ]
    if not probes:
        raise ValueError(f"nothing to screen in {type(model).__name__}: no linear, convolution or batch-norm layer")

    def make_collector(first: Tensor) -> ActivationCollector:
        return ActivationCollector(probes, num_classes or find_num_classes(model, labels=first))

    collector = observe(model, dataloader, make_collector, labels, forward, progress)
    assert collector is not None, "one is made for the first batch"
    found = {name: statistics.f for name, statistics in collector.statistics().items()}
    if collector.unmatched:
        name, reason = next(iter(collector.unmatched.items()))
        raise ValueError(f"layer {name!r} {reason}; leave it out with exclude={list(collector.unmatched)}")
    if missing := [probe.name for probe in probes if probe.name not in found]:
        raise ValueError(
            f"layers {missing} never ran on an instance with a label, so they have no F-statistic: forward uses their "
            f"weights without calling them, or not at all; leave them out with exclude={missing}"
        )
    return found
