"""`prune`: a trained network made smaller in one call, without a Trainer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fscreen.candidates.costs import Currency
from lightning_fscreen.candidates.granularity import Granularity, Patterns
from lightning_fscreen.candidates.prunable import Bias, Feature
from lightning_fscreen.fit.decision import Decision
from lightning_fscreen.fit.masks import Masks
from lightning_fscreen.fit.networks import Network
from lightning_fscreen.fit.report import PruningReport, Record
from lightning_fscreen.fit.settings import Settings
from lightning_fscreen.fit.spending import Spending
from lightning_fscreen.members import Members
from lightning_fscreen.modules import evaluating, uncompiled
from lightning_fscreen.ranking.amounts import Amount
from lightning_fscreen.ranking.budgeted import Scope
from lightning_fscreen.ranking.schedule import one_shot
from lightning_fscreen.slimming import SlimmingPlan
from lightning_fscreen.slimming.optimizers import awaiting, follow_plan, optimizers_of, warn_of_orphans
from lightning_fscreen.statistics.collector import ActivationCollector, FeatureStatistics
from lightning_fscreen.statistics.labels import find_labels, find_num_classes
from lightning_fscreen.statistics.one_pass import EMPTY, Forward, call, device_of, observe

_UNUSED = "the model does not use it on the first batch"
_UNSEEN = "it never ran on an instance with a label, so that nothing is known of its activations"


class Pruned(NamedTuple):
    """What `prune` has done.

    Attributes:
        plan: what was removed.
        report: candidates, parameters and multiply–adds, by layer and in total, before and after.
    """

    plan: SlimmingPlan
    report: PruningReport


def prune(
    model: nn.Module,
    dataloader: Iterable[Any],
    amount: Amount = 0.5,
    *,
    budget: Currency = "macs",
    granularity: Literal["unit", "channel"] = "unit",
    criterion: str = "screening",
    screening_weight: float = 0.25,
    scope: Scope = "global",
    min_channels: int = 1,
    include: Patterns = None,
    exclude: Patterns = None,
    bias: Bias = "mean",
    feature: Feature = "activation",
    num_classes: int | None = None,
    labels: Callable[[Any], Tensor] = find_labels,
    forward: Forward | None = None,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    progress: bool = True,
) -> Pruned:
    """Make a trained network smaller in place, in one call: statistics in one pass, ranking, exact removal.

    What remains computes what the whole network does with the pruned units at a constant (see `slim`). Fine-tune it
    afterwards; or prune little by little, each time a share of what the network is then:

        for _ in range(5):
            prune(model, train_loader, amount=0.15, optimizers=optimizer)
            train_one_epoch(model, optimizer)

    `save_slimmed` keeps all of it together, and `load_slimmed` gives it to a fresh network. Arguments that are not
    explained here are those of `ScreeningPruningCallback`, with its meanings.

    Args:
        model: any module that `torch.export` can capture with the inputs of the first batch.
        dataloader: batches, which the model gets in eval mode; consumed once, and no further than the first batch if
            the criterion looks at weights alone and no mean activations are needed.
        amount: what goes of the multiply–adds, the parameters or the candidates that the model has now; of candidates
            also one for every pattern.
        budget: "macs", "params" or "candidates".
        granularity: "unit": channels of batch norms, outputs of all other layers, heads; "channel": the first alone.
        criterion: any that needs no gradients.
        screening_weight: λ of the criteria that join F and magnitude.
        scope: "global", "kind" or "layer".
        min_channels: units that every layer keeps at least.
        include: glob patterns over module names, one of which a layer must match.
        exclude: glob patterns over module names, none of which a layer may match.
        bias: output of what is pruned: "mean", its mean activation, best where no training follows; "fold", its shift;
            "zero".
        feature: what is screened.
        num_classes: number of classes; by default looked for in the model (`num_classes`, the last linear layer).
        labels: batch → class indices (N,) or class weights (N, C); by default found in (x, y), dicts, ….
        forward: (model, batch) → anything, runs the model; by default calls it with the batch's first item (or the item
            that is not the labels).
        optimizers: the optimizers in use, as of `slim`.
        progress: show a progress bar.

    Returns:
        The plan, and the report.

    Raises:
        ValueError: an argument outside its range, a criterion that needs gradients, an empty loader, labels not found,
            nothing to prune, a budget that cannot be met.
        CaptureError: the model cannot be captured.
        VerificationError: outputs would change.
        Nothing has changed after an error.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_fscreen import prune
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> batches = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(2)]
        >>> plan, report = prune(net, batches, amount=0.5, progress=False)
        >>> net[0], report.before.macs, report.after.macs
        (Linear(in_features=8, out_features=32, bias=True), 704, 352)
    """
    model = uncompiled(model)
    settings = Settings(
        granularity=granularity,
        amount=amount,
        budget=budget,
        criterion=criterion,
        screening_weight=screening_weight,
        scope=scope,
        min_channels=min_channels,
        include=include,
        exclude=exclude,
        bias=bias,
        feature=feature,
        num_classes=num_classes,
        labels=labels,
        schedule=one_shot,
        start_epoch=0,
        end_epoch=None,
        start_step=None,
        end_step=None,
        prune_every=None,
        slim=True,
        collect_every="auto",
        collect_epochs=1,
        rewind_lr=False,
        rewind_weights=False,
        soft=False,
    )
    _check(settings)
    found = _Found(settings.find_candidates(model))
    used = optimizers_of(model, optimizers)
    batches = iter(dataloader)
    if (first := next(batches, None)) is None:
        raise ValueError(EMPTY)
    network = _network(model, first, labels, forward)
    args, kwargs = network.inputs_on_device()
    with network.examining(model):
        found.leave_out(found.granularity.learn(model, args, kwargs), _UNUSED)
    record = Record(None, {})
    record.note_size(network.measure(model), pruned=False)
    spending = Spending(settings, found, record)
    spending.check(Masks(found.granularity.members()))

    def make_collector(labels: Tensor) -> ActivationCollector:
        return found.granularity.collector(num_classes or find_num_classes(model, labels=labels))

    statistics: dict[str, FeatureStatistics] = {}
    unmatched: Mapping[str, str] = {}
    if settings.needs_activations:
        both = itertools.chain([first], batches)
        collector = observe(model, both, make_collector, labels, forward, progress, "pruning")
        statistics, unmatched = dict(collector.statistics()), dict(collector.unmatched)
        found.leave_out([name for name in found.granularity.names if name not in {**statistics, **unmatched}], _UNSEEN)
    members = found.granularity.members()
    masks = Masks(members)
    decision = Decision(settings, found.granularity, masks, spending, statistics, {}, unmatched)
    record.note(decision.explained)
    kept = decision.new_masks(spending.amount(masks), torch.initial_seed() % 2**63)
    before = dict(model.named_parameters())
    awaited = awaiting(before)
    with _restored_after_errors(members), network.examining(model):
        decision.carry_out(kept, (), hold=True)
        plan = found.granularity.slim(model, args, kwargs, kept)
    warn_of_orphans(used, model, follow_plan(used, model, before, plan), awaited)
    record.note_size(network.measure(model), pruned=True)
    return Pruned(plan, _report(model, settings, found.granularity, record, kept, plan))


def _check(settings: Settings) -> None:
    if settings.granularity not in ("unit", "channel"):
        raise ValueError(
            f'prune() removes units: granularity must be "unit" or "channel", got {settings.granularity!r}; for others '
            "use ScreeningPruningCallback"
        )
    if settings.needs_gradients:
        raise ValueError(
            f"criterion={settings.criterion!r} needs gradients, which a pass without a loss does not have; use another "
            "one, or ScreeningPruningCallback"
        )


@dataclass
class _Found:
    """The candidates of the model."""

    granularity: Granularity[Any]

    def leave_out(self, names: Iterable[str], reason: str) -> None:
        self.granularity.leave_out(dict.fromkeys(names, reason))


def _network(model: nn.Module, batch: Any, labels: Callable[[Any], Tensor], forward: Forward | None) -> Network:
    """The model and the inputs that it gets."""
    network = Network("", model)

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if network.inputs is None:
            network.record(args, kwargs)

    batch = move_data_to_device(batch, device_of(model))
    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with evaluating(model), torch.no_grad():
            call(model, batch, labels(batch), forward)
    finally:
        handle.remove()
    if network.inputs is None:
        raise ValueError(f"forward= does not call the {type(model).__name__} that is to be pruned")
    return network


@contextmanager
def _restored_after_errors(members: Mapping[str, Members]) -> Iterator[None]:
    """Put the parameters of candidates back if what is done inside fails."""
    parameters = {parameter for own in members.values() for parameter in (own.weight, *own.others)}
    values = {parameter: parameter.detach().clone() for parameter in parameters}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in values.items():
                parameter.copy_(value)
        raise


def _report(
    model: nn.Module,
    settings: Settings,
    before: Granularity[Any],
    record: Record,
    kept: Mapping[str, Tensor],
    plan: SlimmingPlan,
) -> PruningReport:
    left = settings.find_candidates(model)
    left.restore(before.structure())
    left.keep_only(list(kept), before.not_pruned)
    members, names = left.members(), {parameter: name for name, parameter in model.named_parameters()}
    masks = Masks(members, kept, True, plan, {layer: names[own.weight] for layer, own in members.items()})
    return record.report(
        masks,
        granularity=settings.granularity,
        removed=dict(plan.removed),
        not_pruned=dict(before.not_pruned),
        not_removed=before.still_there(plan),
    )
