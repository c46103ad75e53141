"""`explain`: what could be pruned from a network, what goes together, what it would save, why the rest stays."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_fscreen.candidates.granularity import Granularity, Patterns
from lightning_fscreen.costs.size import Size
from lightning_fscreen.modules import join
from lightning_fscreen.ranking.amounts import Amount
from lightning_fscreen.ranking.multiples import in_multiples
from lightning_fscreen.ranking.per_cost import Costs
from lightning_fscreen.ranking.units import Units
from lightning_fscreen.statistics.one_pass import Forward
from lightning_fscreen.tables import Cell, Row, Shown, Table, grouped, percent, readable
from lightning_fscreen.trained.arguments import Ranking, network_of, settings_of
from lightning_fscreen.trained.auto_amount import MAX_DROP, limit_of
from lightning_fscreen.trained.deciding import decide
from lightning_fscreen.trained.evaluation import Measure
from lightning_fscreen.trained.inputs import with_inputs
from lightning_fscreen.trained.one_shot import Choice, OneShot, Pruned, observed

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on


@dataclass(frozen=True)
class ExplainedLayer:
    """A layer with units that can be pruned.

    Attributes:
        name: its name in the model.
        kind: "channel" of a batch norm, "neuron" (output of a linear or convolution layer), "head" of an attention, or
            "input" of a layer that reads a stream beside batch norms, which saves nothing by itself.
        units: number of its units.
        prunable: how many of them can be pruned; the others are coupled to what stays.
        coupled: other layers that lose the same units.
        params: parameters that go with one of its units, in this layer and in all others; the mean over its units.
        macs: multiply–adds of one instance, likewise.
        kept: how many of its units `prune` would keep; None if that was not asked.
        cut: the highest score of those that would go, and the lowest of the others that could have gone; None where
            there are none, or it is infinite. Scores are those of the criterion, before anything is divided by costs.
    """

    name: str
    kind: str
    units: int
    prunable: int
    coupled: tuple[str, ...]
    params: int
    macs: int
    kept: int | None = None
    cut: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True, repr=False)
class Explanation(Shown):
    """What could be pruned from a network; `print(explanation)`, or a notebook, shows it as a table.

    Attributes:
        layers: those with units that can be pruned, in the order of the network.
        not_pruned: all others with weights, and why.
        params, macs: of the network, and what is left of them if every layer keeps only as much as it has to.
        prediction: what `prune` would do; None if that was not asked.
    """

    layers: tuple[ExplainedLayer, ...]
    not_pruned: Mapping[str, str]
    params: tuple[int, int]
    macs: tuple[int, int]
    prediction: Pruned | None = None

    def to_dict(self) -> dict[str, Any]:
        """As primitives; the prediction as its report."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "not_pruned": dict(self.not_pruned),
            "params": self.params,
            "macs": self.macs,
            "prediction": None if self.prediction is None else self.prediction.report.to_dict(),
        }

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def _table(self) -> Table:
        together = [", ".join(sorted([layer.name, *layer.coupled])) for layer in self.layers if layer.coupled]
        budgets = {"parameters": self.params, "multiply–adds": self.macs}
        least = [f"{percent(full - left, full)} of the {what}" for what, (full, left) in budgets.items()]
        return Table(
            f"{readable(sum(layer.prunable for layer in self.layers))} units can be pruned",
            (
                ("units", "counts"),
                ("parameters of one", "counts"),
                ("multiply–adds of one", "counts"),
                ("would go", "counts"),
                ("highest score that goes", "value"),
                ("lowest that stays", "value"),
            ),
            tuple(Row(layer.name, _cells(layer)) for layer in self.layers),
            None,
            {
                "these arguments would leave": self._left(),
                "at most, with one unit left in every layer": least,
                "lose the same units": list(dict.fromkeys(together)),
                "not pruned": grouped(self.not_pruned.items()),
            },
        )

    def _left(self) -> list[str]:
        if self.prediction is None:
            return []
        report = self.prediction.report
        counts = {
            "units": (report.total, report.kept),
            "parameters": (report.before.params, report.after.params),
            "multiply–adds": (report.before.macs or 0, report.after.macs or 0),
        }
        lines = [
            f"{readable(left)} of {readable(full)} {what} ({percent(left, full)})"
            for what, (full, left) in counts.items()
        ]
        return lines if report.latency is None else [*lines, str(report.latency)]


def _cells(layer: ExplainedLayer) -> tuple[Cell, ...]:
    gone = None if layer.kept is None else (layer.units - layer.kept,)
    below, above = (None if end is None else (end,) for end in layer.cut)
    return (layer.prunable,), (layer.params,), (layer.macs,), gone, below, above


def explain(
    model: nn.Module,
    example_inputs: Any = None,
    granularity: Literal["unit", "channel"] = "unit",
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    dataloader: Iterable[Any] | None = None,
    amount: Amount | Literal["auto"] = 0.5,
    forward: Forward | None = None,
    metric: Measure | None = None,
    val_dataloader: Iterable[Any] | None = None,
    max_drop: float = MAX_DROP,
    progress: bool = True,
    **ranking: Unpack[Ranking],
) -> Explanation:
    """Look at what could be pruned, without changing anything.

    The costs of a unit are what slimming removes with it alone, from the whole network; beside others that go as well
    it is less. A channel of a stream goes when nothing reads it any more (a DenseNet's, behind several batch norms):
    each of the units that read it is said to save its share of that.

    With a dataloader, also what `prune` would do with it and with the same arguments: it is done, and undone. Random
    numbers are then as before, so that a loader that shuffles by them gives `prune` the same batches.

    Args:
        model: any module that `torch.export` can capture; untouched.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments of `forward`, at least two
            instances. With a dataloader they may be left out, for those of its first batch.
        granularity: "unit" or "channel", as of `ScreeningPruningCallback`.
        include: glob patterns over module names, one of which a layer must match.
        exclude: glob patterns over module names, none of which a layer may match.
        dataloader: as of `prune`, and so are all that follow.
        amount: what goes.
        forward: runs the model on a batch.
        metric: for amount="auto".
        val_dataloader: likewise.
        max_drop: likewise.
        progress: show a progress bar.
        ranking: budget, criterion, screening_weight, scope, min_channels, bias, feature, round_to, streams, latency,
            num_classes, labels.

    Raises:
        ValueError: nothing to prune, with all reasons; another granularity; patterns that match nothing; neither inputs
            nor a dataloader; arguments of `prune` without one; as `prune`.
        CaptureError: the model cannot be captured.
        VerificationError: as `prune`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_fscreen import explain
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
        >>> print(explain(net, torch.randn(2, 3, 6, 6)))
        8 units can be pruned
        <BLANKLINE>
        layer  units  parameters of one  multiply–adds of one
        ─────  ─────  ─────────────────  ────────────────────
        1          8                190                   592
        <BLANKLINE>
        at most, with one unit left in every layer:
          86.93 % of the parameters
          87.50 % of the multiply–adds
        <BLANKLINE>
        not pruned:
          a batch norm normalises its outputs, and the channels of that are the units: 0
          it is an output of the network: 4
    """
    model = network_of(model)
    if dataloader is None:
        given = [each for each in (forward, metric, val_dataloader) if each is not None]
        if ranking or given or amount != 0.5 or max_drop != MAX_DROP:
            raise ValueError("what these arguments would prune depends on the data; give dataloader=, too")
        if example_inputs is None:
            raise ValueError("explain() needs example_inputs or a dataloader")
        settings = settings_of(granularity, 0.0, include, exclude, bias="zero")
        found = OneShot(model, settings, settings.find_candidates(model), with_inputs(model, example_inputs))
        return _explanation(model, found)
    auto = amount == "auto"
    settings = settings_of(granularity, 0.0 if amount == "auto" else amount, include, exclude, **ranking)
    limit = limit_of(model, auto, metric, val_dataloader, max_drop, settings.labels, forward)
    found = observed(model, settings, dataloader, forward, example_inputs, progress=progress, title="explaining")
    choice = decide(found, settings.amount, settings.budget) if limit is None else limit.largest(found, progress)
    return _explanation(model, found, choice)


def _explanation(model: nn.Module, found: OneShot, choice: Choice | None = None) -> Explanation:
    granularity, size = found.granularity, found.record.before
    units, whole = found.units, {name: mask.cpu() for name, mask in found.whole.items()}
    costs = {currency: _costs(granularity, size, currency) for currency in ("params", "macs")}
    prices = {currency: _of_units(units, each.priced(whole)[1]) for currency, each in costs.items()}
    zeros = {name: torch.zeros(len(own)) for name, own in units.items()}
    least = Units(zeros, whole, in_multiples(zeros, whole, units, granularity.blocks()), 1).least()
    kinds, members = granularity.kinds(), {name: set(own[own >= 0].tolist()) for name, own in units.items()}
    layers = tuple(
        ExplainedLayer(
            name,
            kinds[name],
            len(own),
            int((own >= 0).sum()),
            tuple(other for other in units if other != name and members[other] & members[name]),
            round(float(prices["params"][name][own >= 0].mean())),
            round(float(prices["macs"][name][own >= 0].mean())),
            None if choice is None else int(choice.kept[name].sum()),
            (None, None) if choice is None else _cut(choice.scores[name].cpu(), choice.kept[name].cpu(), own >= 0),
        )
        for name, own in units.items()
    )
    left = {currency: round(each.of(least)) for currency, each in costs.items()}
    prediction = None if choice is None else found.rehearse(choice)
    assert size.macs is not None
    sizes = (size.params, left["params"]), (size.macs, left["macs"])
    not_pruned = dict(granularity.not_pruned)
    not_pruned |= _without_units(model, {*units, *not_pruned}, granularity.noun)
    return Explanation(layers, not_pruned, *sizes, prediction)


def _without_units(model: nn.Module, named: Collection[str], noun: str) -> dict[str, str]:
    """Modules with parameters of which nothing has been said yet, such as norms without a gate, and why.

    Args:
        model: the model.
        named: its layers, heads and parameters that have been spoken of.
        noun: how candidates are called.
    """
    reasons = {}
    for name, module in model.named_modules():
        own = [join(name, attribute) for attribute, _ in module.named_parameters(recurse=False)]
        if not own or any(each in named for each in (name, *own)):
            continue
        parts = name.split(".")
        inside = any(".".join(parts[:end]) in named for end in range(1, len(parts)))
        reasons[name] = (
            "it is a part of a layer, or an attention, that is listed for itself"
            if inside
            else f"none of its own {noun} are candidates; it loses what goes from the layers around it"
        )
    return reasons


def _cut(scores: Tensor, kept: Tensor, prunable: Tensor) -> tuple[float | None, float | None]:
    """The highest score that goes, and the lowest that stays of what can be pruned."""
    goes, stays = scores[~kept], scores[kept & prunable]
    ends = (float(goes.max()) if len(goes) else math.inf, float(stays.min()) if len(stays) else math.inf)
    below, above = (end if math.isfinite(end) else None for end in ends)
    return below, above


def _costs(found: Granularity[Any], size: Size, currency: Literal["params", "macs"]) -> Costs:
    costs = found.costs(size, currency)
    assert costs is not None
    return costs


def _of_units(units: Mapping[str, Tensor], prices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layer → for each of its units the price of all that goes together."""
    flat, values = torch.cat(list(units.values())), torch.cat([prices[name] for name in units])
    total = values.new_zeros(int(flat.max()) + 2).index_add(0, flat + 1, values)
    return {name: total[own + 1] for name, own in units.items()}
