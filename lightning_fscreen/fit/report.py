"""Reports: candidates, parameters and multiply–accumulates, before and after pruning."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lightning_fscreen.candidates.granularity import GRANULARITIES, Granularity
from lightning_fscreen.costs.size import LayerSize, Size
from lightning_fscreen.fit.masks import Masks
from lightning_fscreen.ranking.criteria import Explained
from lightning_fscreen.tables import Cell, Row, Shown, Table, grouped, percent, readable

if TYPE_CHECKING:
    import pandas

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerReport:
    """Candidates of one layer: connections, or channels.

    Attributes:
        name: name of the layer.
        total: number of candidates.
        kept: number of candidates that remain.
        evidence: the evidence of the last ranking; for `criterion="screening"` the counts of `Evidence`: features, how
            many of them which test spoke for, how many were shrunk, how many more are learned, and why none was shrunk
            where magnitude ranked alone.
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
class LatencyReport:
    """Time of a forward pass of the whole network in eval mode, under a budget of latency: the shortest of several.

    Attributes:
        device: where.
        batch_size: instances at once.
        before, after: measured in milliseconds; at the start of the fit, and now.
        target: milliseconds that the budget leaves.
    """

    device: str
    batch_size: int
    before: float
    after: float
    target: float

    def __str__(self) -> str:
        where = f"on {self.device}, {self.batch_size} at once"
        return f"{self.after:.4g} of {self.before:.4g} ms ({self.after / self.before:.1%}) {where}; {self._wanted}"

    @property
    def _wanted(self) -> str:
        return f"{self.target:.4g} ms were asked for ({self.target / self.before:.1%})"


@dataclass(frozen=True, repr=False)
class PruningReport(Shown):
    """The work of a `ScreeningPruningCallback` so far; `print(report)`, or a notebook, shows it as a table.

    Attributes:
        granularity: "weight" or "channel".
        layers: candidates by layer, in the order of the network.
        before, after: size of the network at the start of the fit, and now.
        removed: hidden units and channels physically removed, by layer.
        not_pruned: layers that were left alone, and why.
        not_removed: what was pruned but could not be removed physically, and why; None if everything went.
        not_rounded: layers with widths that pruning can reduce but that are no multiples of `round_to`, and why.
        latency: measured, under a budget of latency; None under others.
    """

    granularity: str
    layers: tuple[LayerReport, ...]
    before: Size
    after: Size
    removed: Mapping[str, int]
    not_pruned: Mapping[str, str]
    not_removed: str | None = None
    not_rounded: Mapping[str, str] = field(default_factory=dict)
    latency: LatencyReport | None = None

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

    def _table(self) -> Table:
        entries = self._entries()
        noun = GRANULARITIES[self.granularity].noun if self.granularity in GRANULARITIES else "candidates"
        rows = [Row(entry["layer"], _cells(entry)) for entry in entries]
        total: tuple[Cell, ...] = (
            (self.total, self.kept),
            (self.total, self.kept),
            (self.before.params, self.after.params),
            _pair(self.before.macs, self.after.macs),
            (removed,) if (removed := sum(self.removed.values())) else None,
        )
        evidence = [(layer.name, (layer.evidence or {}).get("trusted")) for layer in self.layers]
        return Table(
            f"{readable(self.kept)} of {readable(self.total)} {noun} kept ({percent(self.kept, self.total)}); "
            f"{readable(self.after.nonzero)} of the network's {readable(self.after.params)} parameters are not zero",
            (
                (noun, "counts"),
                ("kept", "share"),
                ("parameters", "counts"),
                ("multiply–adds", "counts"),
                ("units removed", "counts"),
            ),
            tuple(rows),
            total,
            {
                "latency": [] if self.latency is None else [str(self.latency)],
                "not pruned": grouped(self.not_pruned.items()),
                "not physically removed": [self.not_removed] if self.not_removed else [],
                "no multiples of round_to": grouped(self.not_rounded.items()),
                "ranked by magnitude alone": grouped((name, reason) for name, reason in evidence if reason),
            },
        )

    def _entries(self) -> list[dict[str, Any]]:
        """What is known of every layer, in the order of the network."""
        candidates = {layer.name: layer for layer in self.layers}
        sizes = self.before.layers
        entries = []
        for name in dict.fromkeys([*sizes, *self.after.layers, *candidates, *self.not_pruned]):
            before, after = (size.layers.get(name, _absent(size)) for size in (self.before, self.after))
            layer = candidates.get(name)
            entries.append(
                {
                    "layer": name,
                    "total": layer and layer.total,
                    "kept": layer and layer.kept,
                    "params_before": before.params,
                    "params_after": after.params,
                    "macs_before": before.macs,
                    "macs_after": after.macs,
                    "removed": self.removed.get(name, 0),
                    "not_pruned": self.not_pruned.get(name),
                }
            )
        return entries

    def to_json(self) -> str:
        """As JSON text, with the keys of a run's `report.json`."""
        return json.dumps(self.to_dict(), indent=2)

    def to_pandas(self) -> pandas.DataFrame:
        """One line for every layer, in the order of the network.

        Returns:
            A frame with the index `layer` and the columns `total` and `kept` (candidates; missing where there are
            none), `params_before`, `params_after`, `macs_before`, `macs_after`, `removed` (units and channels) and
            `not_pruned` (why; missing for the others).

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("report.to_pandas() needs pandas, which is not installed: pip install pandas") from error
        frame = pandas.DataFrame(self._entries()).set_index("layer")
        counts = [column for column in frame.columns if column != "not_pruned"]
        return frame.astype(dict.fromkeys(counts, "Int64"))

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
            "not_rounded": dict(self.not_rounded),
            "latency_budget": None if self.latency is None else asdict(self.latency),
            "modules": [
                {
                    "name": entry["layer"],
                    "params": {"before": entry["params_before"], "after": entry["params_after"]},
                    "macs": {"before": entry["macs_before"], "after": entry["macs_after"]},
                }
                for entry in self._entries()
            ],
        }


def _absent(size: Size) -> LayerSize | _Unknown:
    """Size of a layer that a measurement does not have: nothing is left of it, or nothing is known of any layer."""
    return LayerSize(0, None if size.macs is None else 0) if size.layers else _Unknown()


@dataclass(frozen=True)
class _Unknown:
    params: None = None
    macs: None = None


def _pair(before: int | None, after: int | None) -> Cell:
    return None if before is None or after is None else (before, after)


def _cells(entry: Mapping[str, Any]) -> tuple[Cell, ...]:
    candidates = _pair(entry["total"], entry["kept"])
    params = _pair(entry["params_before"], entry["params_after"])
    macs = _pair(entry["macs_before"], entry["macs_after"])
    return candidates, candidates, params, macs, (entry["removed"],) if entry["removed"] else None


class Record:
    """Sizes of a network and evidence of its rankings, collected for the report while it is pruned.

    Args:
        sizes: the size at the start, of a state: `astuple` of a `Size`; None at the beginning.
        evidence: that of earlier rankings, by layer.
    """

    def __init__(self, sizes: Sequence[Any] | None, evidence: Mapping[str, Mapping[str, Any]]) -> None:
        self.before = self.after = Size(0, 0, None) if sizes is None else _size_of(*sizes)
        self.evidence = {name: dict(found) for name, found in evidence.items()}

    def note_size(self, size: Size, pruned: bool) -> None:
        """Note the present size; it is that of the start, too, until something is pruned."""
        self.after = size
        if not pruned:
            self.before = size
        elif self.before.macs is None:  # masks do not change them
            layers = {name: replace(own, macs=size.layers[name].macs) for name, own in self.before.layers.items()}
            self.before = replace(self.before, macs=size.macs, layers=layers, latency=size.latency)

    def note_latency(self, dense: int, pruned: int | None = None) -> None:
        """Note nanoseconds that were measured together."""
        self.before = replace(self.before, latency=dense)
        self.after = replace(self.after, latency=dense if pruned is None else pruned)

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


def _size_of(
    params: int,
    nonzero: int,
    macs: int | None,
    layers: Mapping[str, Sequence[Any]] | None = None,
    latency: int | None = None,
) -> Size:
    """From `astuple` of a size; earlier versions did not know the layers, nor the latency."""
    return Size(params, nonzero, macs, {name: LayerSize(*size) for name, size in (layers or {}).items()}, latency)


def metrics_of(report: PruningReport, kind: type[Granularity[Any]]) -> dict[str, float]:
    """For the log: the kept fraction of every layer and, where it changes in the fit, the size of the network."""
    metrics = {f"fscreen/kept/{layer.name}": layer.kept / layer.total for layer in report.layers}
    if kind.slims_in_fit:
        metrics |= {f"fscreen/{kind.noun}": report.kept, "fscreen/params": report.after.params}
        metrics |= {} if report.after.macs is None else {"fscreen/macs": report.after.macs}
    return {name: float(value) for name, value in metrics.items()}
