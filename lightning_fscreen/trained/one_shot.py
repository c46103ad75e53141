"""A trained network whose units are ranked at once, without a Trainer: what goes is masked, removed, or rehearsed."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_fscreen.candidates.granularity import Granularity
from lightning_fscreen.candidates.regression import Regression
from lightning_fscreen.fit.decision import Decision
from lightning_fscreen.fit.masks import Masks
from lightning_fscreen.fit.networks import Network
from lightning_fscreen.fit.rehearsal import copied, remember
from lightning_fscreen.fit.report import PruningReport, Record
from lightning_fscreen.fit.settings import Settings
from lightning_fscreen.fit.spending import Spending
from lightning_fscreen.modules import is_empty
from lightning_fscreen.randomness import same_random_numbers
from lightning_fscreen.ranking.amounts import Amount
from lightning_fscreen.slimming import SlimmingPlan
from lightning_fscreen.slimming.apply import Agree, rehearsed, unanimous
from lightning_fscreen.statistics.collector import ActivationCollector
from lightning_fscreen.statistics.labels import find_num_classes
from lightning_fscreen.statistics.one_pass import EMPTY, Forward, device_of, observe
from lightning_fscreen.statistics.probes import FeatureStatistics
from lightning_fscreen.trained.inputs import of_batch, with_inputs

log = logging.getLogger(__name__)

_FEW = 64
"""Under so many instances errors of reconstruction ranked worse than screening did."""

_UNUSED = "the model does not use it on these inputs"
_UNSEEN = "it never ran on an instance with a label, so that nothing is known of its activations"


class Pruned(NamedTuple):
    """What `prune` has done.

    Attributes:
        plan: what was removed.
        report: candidates, parameters and multiply–adds, by layer and in total, before and after.
    """

    plan: SlimmingPlan
    report: PruningReport


class Choice(NamedTuple):
    """What goes under one amount.

    Attributes:
        kept: layer → (units,) bool, False where a unit goes.
        scores: layer → (units,), of the criterion.
        amount: what was asked for.
    """

    kept: dict[str, Tensor]
    scores: Mapping[str, Tensor]
    amount: Amount


def observed(
    model: nn.Module,
    settings: Settings,
    dataloader: Iterable[Any],
    forward: Forward | None,
    example_inputs: Any = None,
    *,
    progress: bool,
    title: str,
) -> OneShot:
    """A model with the statistics that its ranking needs; global random numbers stay as they are.

    Args:
        model: any module, not under `torch.compile`.
        settings: from `settings_of`.
        dataloader: batches; consumed once, and no further than the first if no statistics are needed.
        forward: runs the model on a batch.
        example_inputs: of the model's forward, as of `slim`; by default those of the first batch.
        progress: show a progress bar.
        title: of that.

    Raises:
        ValueError: an empty loader, labels not found, nothing to prune, a budget that cannot be met.
        CaptureError: the model cannot be captured.
    """
    granularity = settings.find_candidates(model)
    with same_random_numbers():  # a loader that shuffles draws some
        batches = iter(dataloader)
        if (first := next((batch for batch in batches if not is_empty(batch)), None)) is None:
            raise ValueError(EMPTY)
        if example_inputs is None:
            network = of_batch(model, first, settings, forward)
        else:
            network = with_inputs(model, example_inputs)
        found = OneShot(model, settings, granularity, network)
        found.check()
        if settings.needs_activations or settings.needs_moments:
            found.observe(itertools.chain([first], batches), forward, progress, title)
    return found


class OneShot:
    """A model and its candidates.

    Args:
        model: any module, not under `torch.compile`.
        settings: from `settings_of`.
        granularity: the candidates, from `settings`; learns from the network which of them can be pruned.
        network: the model with its inputs.

    Attributes:
        granularity: the candidates.
        record: the size of the model.

    Raises:
        ValueError: nothing to prune, with all reasons.
        CaptureError: the model cannot be captured.
    """

    def __init__(self, model: nn.Module, settings: Settings, granularity: Granularity[Any], network: Network) -> None:
        self._model, self._settings, self._network = model, settings, network
        self.granularity, self.record = granularity, Record(None, {})
        self._inputs = args, kwargs = network.inputs_on_device()
        with network.examining(model):
            unused = granularity.learn(model, args, kwargs)
        granularity.leave_out(dict.fromkeys(unused, _UNUSED))
        self._timings = settings.timings(device_of(model))
        self._dense = network.module if self._timings is None else copied(network.module)
        self._measure(pruned=False)
        self._statistics: Mapping[str, FeatureStatistics] = {}
        self._unmatched: Mapping[str, str] = {}
        self._regression: Regression | None = None
        self._not_rounded: dict[str, str] = {}

    def check(self) -> None:
        """Check, before anything is read, that the amount can be met; but whether a latency can is measured later.

        Raises:
            ValueError: it cannot; says how much can go.
        """
        self._spending(self._settings).check(self._masks())

    def observe(self, batches: Iterable[Any], forward: Forward | None, progress: bool, title: str) -> None:
        """Gather statistics of activations; layers that want some and have none are left out."""
        granularity, settings = self.granularity, self._settings
        if settings.needs_moments:
            self._regression = granularity.regression()

        def make_collector(labels: Tensor) -> ActivationCollector:
            return granularity.collector(settings.num_classes or find_num_classes(self._model, labels=labels))

        collector = observe(
            self._model,
            batches,
            make_collector if settings.needs_activations else None,
            settings.labels,
            forward,
            progress,
            title,
            None if self._regression is None else self._regression.moments,
        )
        if collector is not None:
            self._statistics, self._unmatched = dict(collector.statistics()), dict(collector.unmatched)
            unseen = [name for name in granularity.names if name not in {**self._statistics, **self._unmatched}]
            granularity.leave_out(dict.fromkeys(unseen, _UNSEEN))
        if self._regression is not None and settings.resolved_criterion.needs_errors:
            _warn_of_few(self._regression.moments.instances)

    @property
    def units(self) -> dict[str, Tensor]:
        """Layer → (units,) int64 on the CPU, equal for units that go together, negative for those that stay."""
        return {name: own.cpu() for name, own in (self.granularity.units() or {}).items()}

    @property
    def whole(self) -> dict[str, Tensor]:
        """Masks that keep all."""
        return self._masks().present

    def choose(self, amount: Amount) -> Choice:
        """What goes under an amount; nothing is changed.

        Raises:
            ValueError: NaN scores; a budget that cannot be met.
        """
        settings, masks = replace(self._settings, amount=amount), self._masks()
        spending = self._spending(settings)
        decision = Decision(
            settings, self.granularity, masks, spending, self._statistics, {}, self._unmatched, self._errors
        )
        self.record.note(decision.explained)
        fraction, seed = spending.amount(masks), torch.initial_seed() % 2**63
        return Choice(decision.new_masks(fraction, seed), decision.scores(fraction, seed), amount)

    @cached_property  # the same for every amount
    def _errors(self) -> Mapping[str, Tensor]:
        if self._regression is None or not self._settings.resolved_criterion.needs_errors:
            return {}
        errors = self._regression.errors(self.units)
        return {name: errors[name].to(layer.weight.device) for name, layer in self.granularity.members().items()}

    def latency_under(self, choice: Choice) -> float:
        """Latency without what goes, as a share of what it is now, both measured again."""
        report = self.rehearse(choice).report
        self.record.note_size(report.before, pruned=False)
        assert report.latency is not None, "a latency is measured"
        return report.latency.after / report.latency.before

    def most(self) -> float:
        """The largest amount that the floors leave."""
        return self._spending(self._settings).most(self._masks())

    @contextmanager
    def masked(self, kept: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, what is not kept is switched off, as right before it would be removed."""
        put_back = self._remember()
        try:
            self._switch_off(kept)
            yield
        finally:
            put_back()

    def slim(self, kept: Mapping[str, Tensor], agree: Agree = unanimous) -> SlimmingPlan:
        """Remove what is not kept, in place.

        Raises:
            VerificationError: outputs would change; nothing has changed then, nor after an error of `agree`.
        """
        put_back = self._remember()
        try:
            with self._network.examining(self._model):
                self._switch_off(kept)
                self._not_rounded = self.granularity.not_rounded(kept)
                return self.granularity.slim(self._model, *self._inputs, kept, agree=agree)
        except BaseException:
            put_back()
            raise

    def rehearse(self, choice: Choice) -> Pruned:
        """What `slim` would do, with its report; everything is undone.

        Raises:
            VerificationError: as `slim`.
        """
        put_back = self._remember()
        try:
            return rehearsed(partial(self.slim, choice.kept), partial(self.report, choice))
        finally:
            put_back()

    def report(self, choice: Choice, plan: SlimmingPlan) -> Pruned:
        """The plan with the report, while the model is slim."""
        before, kept = self.granularity, choice.kept
        self._measure(pruned=True)
        left = self._settings.find_candidates(self._model)
        left.restore(before.structure())
        left.keep_only(list(kept), before.not_pruned)
        members, names = left.members(), {parameter: name for name, parameter in self._model.named_parameters()}
        masks = Masks(members, kept, True, plan, {layer: names[own.weight] for layer, own in members.items()})
        report = self.record.report(
            masks,
            granularity=self._settings.granularity,
            removed=dict(plan.removed),
            not_pruned=dict(before.not_pruned),
            not_removed=before.still_there(plan),
            not_rounded=self._not_rounded,
            latency=self._spending(replace(self._settings, amount=choice.amount)).latency(masks),
        )
        return Pruned(plan, report)

    def _measure(self, pruned: bool) -> None:
        with self._network.examining(self._model):
            self.record.note_size(self._network.measure(self._model), pruned)
            if self._timings is not None:
                modules = [self._dense, self._network.module] if pruned else [self._dense]
                self.record.note_latency(*(round(1e6 * ms) for ms in self._network.times(self._timings, modules)))

    def _masks(self) -> Masks:
        return Masks(self.granularity.members())

    def _spending(self, settings: Settings) -> Spending:
        return Spending(settings, self, self.record, self._timings)

    def _switch_off(self, kept: Mapping[str, Tensor]) -> None:
        masks = self._masks()
        masks.set(kept)
        pruned = {name: ~mask for name, mask in masks.present.items()}
        if self._regression is not None and self._settings.bias == "ridge":
            self._regression.apply(torch.cat([own[~kept[name].cpu()] for name, own in self.units.items()]).unique())
        self.granularity.after_pruning(pruned, self._statistics)

    def _remember(self) -> Callable[[], None]:
        """What puts the parameters back that are changed when candidates are switched off."""
        members = self.granularity.members().values()
        parameters: set[Tensor] = {parameter for own in members for parameter in (own.weight, *own.others)}
        parameters |= set(self._regression.parameters) if self._regression is not None else set()
        return remember(parameters)


def _warn_of_few(instances: int) -> None:
    if 0 < instances < _FEW:
        log.warning(
            "%d instances are few for this criterion: give it some hundred, or pass criterion='screening', which "
            "ranked better from so few",
            instances,
        )
