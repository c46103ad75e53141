"""`sensitivity`: how much a metric depends on each group of coupled units, measured with some of them masked."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_fscreen.candidates.granularity import Patterns
from lightning_fscreen.candidates.prunable import Compensation, Feature
from lightning_fscreen.modules import coupled_layers, named_tensors
from lightning_fscreen.ranking.units import Units
from lightning_fscreen.saving.lines import Runs
from lightning_fscreen.saving.slimmed import digest
from lightning_fscreen.statistics.labels import find_labels
from lightning_fscreen.statistics.one_pass import Forward
from lightning_fscreen.tables import Row, Shown, Table, listing
from lightning_fscreen.trained.arguments import network_of, settings_of
from lightning_fscreen.trained.evaluation import Evaluation, Measure
from lightning_fscreen.trained.one_shot import OneShot, observed

FRACTIONS = (0.25, 0.5, 0.75)
_SAME = 0.01  # share by which the metric of an untouched network may differ when its file is gone on with


@dataclass(frozen=True)
class GroupSensitivity:
    """Units that are pruned together, because their layers are coupled.

    Attributes:
        layers: the layers.
        units: how many units of theirs can be pruned, each in all of its layers at once.
        off: how many of them were masked, by fraction.
        metrics: the metric then.
    """

    layers: tuple[str, ...]
    units: int
    off: tuple[int, ...]
    metrics: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class Sensitivity(Shown):
    """How a metric depends on each group; `print(sensitivity)`, or a notebook, shows it as a table.

    `cli.layer_figures.sensitivity_figure` draws it.

    Attributes:
        fractions: of the units of one group that were masked, the lowest-ranked first.
        metric: of the network as it is.
        groups: in the order of the network.
    """

    fractions: tuple[float, ...]
    metric: float
    groups: tuple[GroupSensitivity, ...]

    def to_dict(self) -> dict[str, Any]:
        """As primitives."""
        return asdict(self)

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def _table(self) -> Table:
        shares = [f"{100 * fraction:g} % masked" for fraction in self.fractions]
        return Table(
            f"the metric is {self.metric:.4g}, and with units of one group masked:",
            (("units", "counts"), *((share, "value") for share in shares)),
            tuple(
                Row(listing(group.layers), ((group.units,), *((metric,) for metric in group.metrics)))
                for group in self.groups
            ),
            most_rows=len(self.groups),  # no sums of metrics
        )


def sensitivity(
    model: nn.Module,
    dataloader: Iterable[Any],
    metric: Measure,
    fractions: Sequence[float] = FRACTIONS,
    *,
    val_dataloader: Iterable[Any] | None = None,
    results: str | os.PathLike[str] | None = None,
    granularity: Literal["unit", "channel"] = "unit",
    criterion: str = "reconstruction",
    screening_weight: float = 0.25,
    include: Patterns = None,
    exclude: Patterns = None,
    bias: Compensation = "ridge",
    feature: Feature = "activation",
    num_classes: int | None = None,
    labels: Callable[[Any], Tensor] = find_labels,
    forward: Forward | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measure how much a metric depends on each group of coupled units; the model is as before afterwards.

    Groups are the layers that lose the same units. Of one group at a time, the fraction of its units that the
    criterion ranks lowest is switched off, as `prune` does before it removes them; each layer keeps one at least. Each
    time the metric is evaluated: one evaluation for every group and fraction, and one of the model as it is.

    Args:
        model: as of `prune`, and so are the arguments that are not explained here.
        dataloader: batches for the statistics.
        metric: (model, dataloader) → float; or a metric of torchmetrics, that is given outputs and labels. The model is
            in eval mode then, without gradients.
        fractions: of the units of each group, in (0, 1].
        val_dataloader: batches for the metric; by default the same.
        results: a file of JSON lines that every evaluation is added to. What is there already, for the same weights and
            masks, is not evaluated again; use one file for one metric and one data set.
        granularity: "unit" or "channel".
        criterion: any that needs no gradients. "reconstruction": by how much the layers that read a unit are off
            without it, if the other units make up for it.
        screening_weight: λ of the criteria that join F and magnitude.
        include: glob patterns over module names, one of which a layer must match.
        exclude: glob patterns over module names, none of which a layer may match.
        bias: what stands for the output of what is masked: "ridge", "mean", "fold" or "zero".
        feature: what is screened.
        num_classes: number of classes.
        labels: batch → class indices (N,) or class weights (N, C).
        forward: (model, batch) → anything, runs the model.
        progress: show progress bars.

    Raises:
        ValueError: as `prune`; fractions outside (0, 1], a metric that is no finite number, a dataloader that can be
            read only once, a file of another kind, metric or data set.
        FileNotFoundError: the folder of the file does not exist.
        CaptureError: the model cannot be captured.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_fscreen import sensitivity
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> batches = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(2)]
        >>> def accuracy(net, batches):
        ...     return sum((net(x).argmax(1) == y).float().mean() for x, y in batches) / len(batches)
        >>> found = sensitivity(net, batches, accuracy, progress=False)
        >>> [(group.layers, group.off) for group in found.groups]
        [(('0',), (16, 32, 48))]
    """
    model = network_of(model)
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise ValueError(f"fractions are those of the units of a group that are masked, in (0, 1], got {fractions!r}")
    settings = settings_of(
        granularity,
        0.0,
        include,
        exclude,
        budget="candidates",
        criterion=criterion,
        screening_weight=screening_weight,
        bias=bias,
        feature=feature,
        num_classes=num_classes,
        labels=labels,
    )
    batches = dataloader if val_dataloader is None else val_dataloader
    runs = Runs(None if results is None else Path(results))
    evaluation = Evaluation(model, metric, batches, labels, forward)
    network = digest(bias, {name: tensor.detach().cpu() for name, tensor in named_tensors(model).items()})
    before = evaluation("the network as it is")
    _check_same(runs.metric(network, lambda: before), before, results)
    found = observed(model, settings, dataloader, forward, progress=progress, title="statistics")
    scores = {name: score.cpu() for name, score in found.choose(0.0).scores.items()}
    groups = coupled_layers({name: own.tolist() for name, own in found.units.items()})
    measured = []
    with tqdm(total=len(groups) * len(fractions), unit="evaluation", disable=not progress) as bar:
        for layers in groups:
            units = {name: found.units[name] for name in layers}
            count, masks = _masks(units, scores, fractions)
            off = tuple(_count(units, kept) for kept in masks)
            metrics = []
            for fraction, gone, kept in zip(fractions, off, masks, strict=True):
                about = {"layers": layers, "fraction": fraction, "off": gone}
                evaluate = partial(_evaluate, evaluation, found, kept, f"the network with {gone} units of {layers} off")
                metrics.append(runs.metric(digest(network, kept), evaluate, **about))
                bar.update()
            measured.append(GroupSensitivity(tuple(layers), count, off, tuple(metrics)))
    return Sensitivity(tuple(fractions), before, tuple(measured))


def _masks(
    units: Mapping[str, Tensor], scores: Mapping[str, Tensor], fractions: Sequence[float]
) -> tuple[int, list[dict[str, Tensor]]]:
    """Number of units of one group that can be pruned, and masks without the lowest fractions of them."""
    whole = {name: torch.ones_like(own, dtype=torch.bool) for name, own in units.items()}
    count = _count(units, {name: ~mask for name, mask in whole.items()})
    ranked = Units({name: scores[name] for name in units}, whole, units, min_kept=1)
    order = ranked.lowest_first(ranked.scores)
    return count, [ranked.without(order[: round(fraction * count)]) for fraction in fractions]


def _count(units: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> int:
    """How many units are not kept, those that go together counted once."""
    numbers = torch.cat([own[~kept[name]] for name, own in units.items()])
    return len(numbers[numbers >= 0].unique())


def _evaluate(evaluation: Evaluation, found: OneShot, kept: Mapping[str, Tensor], what: str) -> float:
    with found.masked({**found.whole, **kept}):
        return evaluation(what)


def _check_same(known: float, now: float, path: str | os.PathLike[str] | None) -> None:
    if not math.isclose(known, now, rel_tol=_SAME):
        raise ValueError(
            f"the metric of the network as it is is {now:g}, but {str(path)!r} has {known:g}: of another metric or "
            "other data; give another file"
        )
