"""Reports: candidates, parameters and multiply–accumulates, before and after pruning."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lightning_fscreen.candidates.granularity import Granularity
from lightning_fscreen.costs.size import Size, measure_size
from lightning_fscreen.fit.masks import Masks
from lightning_fscreen.ranking.criteria import Explained

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerReport:
    """Candidates of one layer: connections, or channels.

    Attributes:
        name: name of the layer.
        total: number of candidates.
        kept: number of candidates that remain.
        evidence: the evidence of the last ranking; for `criterion="screening"` the counts of `Evidence`: features, how
            many of them which test spoke for, how many were shrunk, and why none was where magnitude ranked alone.
            None if the criterion does not say.
        dead: how many of those that remain did nothing and went when the network became smaller: connections into units
            that nobody reads, or out of units that are always zero; channels that nobody reads.
    """

    name: str
    total: int
    kept: int
    evidence: Mapping[str, Any] | None = None
    dead: int = 0


@dataclass(frozen=True)
class PruningReport:
    """The work of a `ScreeningPruningCallback` so far.

    Attributes:
        granularity: "weight" or "channel".
        layers: candidates by layer, in the order of the network.
        before, after: size of the network at the start of the fit, and now.
        removed: hidden units and channels physically removed, by layer.
        not_pruned: layers that were left alone, and why.
        not_removed: what was pruned but could not be removed physically, and why; None if everything went.
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
        """Number of candidates that remain."""
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


class Record:
    """Sizes of a network and evidence of its rankings, collected for the report while it is pruned.

    Args:
        network: the network.
        sizes: its size at the start, if it has been slimmed since: arguments of `Size`.
        evidence: that of earlier rankings, by layer.
    """

    def __init__(
        self, network: nn.Module, sizes: Sequence[Any] | None, evidence: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.after = measure_size(network, None, 1)
        self.before = Size(*sizes) if sizes is not None else self.after
        self.evidence = {name: dict(found) for name, found in evidence.items()}

    def note(self, explained: Mapping[str, Explained]) -> None:
        """Note why layers are ranked as they are, and log it where trust has changed."""
        for name, evidence in explained.items():
            found = evidence.to_dict()
            if found.get("trusted") != self.evidence.get(name, {}).get("trusted"):
                log.info("layer %r: %s", name, evidence)
            self.evidence[name] = found

    def report(self, masks: Masks, **others: Any) -> PruningReport:
        """The report.

        Args:
            masks: the masks now.
            others: the other attributes of `PruningReport`.
        """
        num_kept, dead = masks.num_kept, masks.num_dead
        layers = tuple(
            LayerReport(name, mask.numel(), num_kept[name], self.evidence.get(name), dead[name])
            for name, mask in masks.kept.items()
        )
        return PruningReport(layers=layers, before=self.before, after=self.after, **others)


def metrics_of(report: PruningReport, kind: type[Granularity[Any]]) -> dict[str, float]:
    """For the log: the kept fraction of every layer and, where it changes in the fit, the size of the network."""
    metrics = {f"fscreen/kept/{layer.name}": layer.kept / layer.total for layer in report.layers}
    if kind.slims_in_fit:
        metrics |= {f"fscreen/{kind.noun}": report.kept, "fscreen/params": report.after.params}
        metrics |= {} if report.after.macs is None else {"fscreen/macs": report.after.macs}
    return {name: float(value) for name, value in metrics.items()}
