"""What pruning did: candidates, parameters and multiply–accumulates, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_fscreen.slimming.capture import evaluating


@dataclass(frozen=True)
class LayerReport:
    """Candidates of one layer: connections, or channels.

    Attributes:
        name: name of the layer.
        total: number of candidates.
        kept: candidates left.
        evidence: what the last ranking went by; for `criterion="screening"` the counts of `Evidence`: features, how
            many of them which test spoke for, how many were shrunk, and why none was where magnitude ranked alone.
            None if the criterion does not say.
    """

    name: str
    total: int
    kept: int
    evidence: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Size:
    """Size of a network.

    Attributes:
        params: number of parameter values.
        nonzero: those that are not zero.
        macs: multiply–accumulate operations of one instance, as dense layers compute them; None if no input was seen.
    """

    params: int
    nonzero: int
    macs: int | None


@dataclass(frozen=True)
class PruningReport:
    """What a `ScreeningPruningCallback` has done so far.

    Attributes:
        granularity: "weight" or "channel".
        layers: candidates by layer, in the order of the network.
        before, after: size of the network at the start of the fit, and now.
        removed: hidden units and channels physically removed, by layer.
        not_pruned: layers that were left alone, and why.
        not_removed: why nothing could be removed physically; None if nothing stood in the way.
    """

    granularity: str
    layers: tuple[LayerReport, ...]
    before: Size
    after: Size
    removed: Mapping[str, int]
    not_pruned: Mapping[str, str]
    not_removed: str | None = None

    @property
    def total(self) -> int:
        """Number of candidates."""
        return sum(layer.total for layer in self.layers)

    @property
    def kept(self) -> int:
        """Candidates left."""
        return sum(layer.kept for layer in self.layers)

    @property
    def pruned_fraction(self) -> float:
        """Fraction of the candidates pruned, in [0, 1]."""
        return 1 - self.kept / self.total

    def to_dict(self) -> dict[str, Any]:
        """As primitives, in the form of a run's `report.json`."""
        return {
            "granularity": self.granularity,
            "candidates": {"total": self.total, "kept": self.kept, "pruned_fraction": self.pruned_fraction},
            "params": {"before": self.before.params, "after": self.after.params, "nonzero": self.after.nonzero},
            "macs": {"before": self.before.macs, "after": self.after.macs},
            "layers": [
                {key: value for key, value in asdict(layer).items() if value is not None} for layer in self.layers
            ],
            "removed": dict(self.removed),
            "not_pruned": dict(self.not_pruned),
            "not_removed": self.not_removed,
        }


def measure_size(network: nn.Module, inputs: tuple[tuple[Any, ...], Mapping[str, Any]] | None, instances: int) -> Size:
    """Size of a network now.

    Args:
        network: the network.
        inputs: arguments and keyword arguments of its forward, to count operations with; None to leave them out.
        instances: number of instances in `inputs`.
    """
    parameters = list(network.parameters())
    macs = None
    if inputs is not None:
        with evaluating(network), torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(*inputs[0], **inputs[1])
        macs = round(counter.get_total_flops() / 2 / instances)
    return Size(sum(p.numel() for p in parameters), sum(int((p != 0).sum()) for p in parameters), macs)
