"""What a captured network has shown of its units."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_fscreen.candidates.latency import capture_for
from lightning_fscreen.candidates.magnitude import Reader
from lightning_fscreen.candidates.prunable import PrunableUnits
from lightning_fscreen.modules import join, named_tensors
from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.gates import STAYS, Gate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learned:
    """One network: its layers that can be pruned, and why others cannot.

    Attributes:
        network: the network.
        captured: its graph.
        inputs: those that it was captured with.
        instances: how many these are.
        layers: those that can be pruned.
        excluded: others, and why they cannot.
        readers: weights that multiply units.
    """

    network: nn.Module
    captured: Capture
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    instances: int
    layers: list[PrunableUnits]
    excluded: dict[str, str]
    readers: list[Reader]
    _timed: dict[int, Capture] = field(default_factory=dict)

    def timed(self, batch_size: int) -> Capture:
        """The graph of eval mode with so many instances."""
        if batch_size not in self._timed:
            self._timed[batch_size] = capture_for(self.network, *self.inputs, batch_size)
        return self._timed[batch_size]


def readers_of(network: nn.Module, captured: Capture, gates: Collection[Gate], first: int = 0) -> list[Reader]:
    """The weights, buffers too, that multiply units of some gates; the units are numbered from `first` on."""
    reading, tensors = {name: own for gate in gates for name, own in gate.readers.items()}, named_tensors(network)
    return [
        Reader(tensors[name], dim, _numbered(torch.tensor(labels), first), len(captured.users(name)))
        for name, (dim, labels) in reading.items()
    ]


def numbered_from(layer: PrunableUnits, first: int) -> PrunableUnits:
    """With other numbers of units: a network's own begin at 0."""
    readers = tuple(replace(reader, labels=_numbered(reader.labels, first)) for reader in layer.readers)
    return replace(layer, units=_numbered(layer.units, first), readers=readers)


def _numbered(units: Tensor, first: int) -> Tensor:
    return torch.where(units == STAYS, STAYS, units + first)


def warn_of_unused(model: nn.Module, tensors: Collection[str], told: Collection[str]) -> set[str]:
    """Warn of layers that may be used later, by another method or for another task: they will not fit then.

    Args:
        model: the model.
        tensors: names of those that a call of its network does not use.
        told: layers of which there was a warning.

    Returns:
        The layers of which there is one now.
    """
    layers = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | _ConvNd)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and join(name, "weight") in tensors
        and name not in told
    }
    if layers:
        log.warning(
            "the call that was looked at does not use %s, so it is not known what %s: if used later, with what becomes "
            "smaller, such layers no longer fit; leave out by exclude what makes their inputs",
            ", ".join(sorted(layers)),
            "it reads" if len(layers) == 1 else "they read",
        )
    return layers


def warn_of_hooks(network: nn.Module, place: str, told: Collection[str]) -> set[str]:
    """Warn of modules whose forward hooks, none of torch's, Lightning's or ours, will see smaller tensors.

    Args:
        network: the network.
        place: its name in the model.
        told: modules of which there was a warning, by their names in the model.

    Returns:
        The modules of which there is one now.
    """
    modules = {
        join(place, name)
        for name, module in network.named_modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)  # noqa: SLF001  # torch has no public list
        if name and join(place, name) not in told and any(map(_is_foreign, hooks.values()))
    }
    if modules:
        log.warning(
            "forward hooks of %s see what becomes smaller; if they need all of it (features for another loss), leave "
            "out by exclude what makes it",
            ", ".join(sorted(modules)),
        )
    return modules


def _is_foreign(hook: Any) -> bool:
    function = hook.func if isinstance(hook, functools.partial) else hook
    home = getattr(function, "__module__", None) or type(function).__module__
    return home.split(".")[0] not in ("torch", "lightning", "pytorch_lightning", "lightning_fscreen")
