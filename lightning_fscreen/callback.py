"""`ScreeningPruningCallback`: which Trainer hook does what. No mathematics here."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer

from lightning_fscreen.candidates import PrunableWeight, find_weights
from lightning_fscreen.collect import ActivationCollector, FeatureStatistics, Probe
from lightning_fscreen.criteria import Ranked, resolve_criterion
from lightning_fscreen.distributed import broadcast_buffers, check_strategy, decide_once, merge_processes
from lightning_fscreen.labels import find_labels, infer_num_classes
from lightning_fscreen.masks import Masks
from lightning_fscreen.network import InputRecorder, common_parent
from lightning_fscreen.ranking import SCOPES, rank_and_prune
from lightning_fscreen.report import LayerReport, PruningReport, Size, measure_size
from lightning_fscreen.schedule import Schedule, resolve_schedule, scheduled_fraction
from lightning_fscreen.slimming import CaptureError, SlimmingPlan, VerificationError, remove_dead_units

log = logging.getLogger(__name__)

GRANULARITIES = ("weight",)
CONNECTIONS = ("factored", "exact")
# Without an end_epoch, the second half of the training fine-tunes what is left.
_DEFAULT_WINDOW = 0.5


class ScreeningPruningCallback(Callback):
    """Prune a classifier while it trains, by what its activations say about the classes (F-statistic) and by magnitude.

    At the end of every epoch of the window the lowest-ranked connections go, down to the budget of the schedule; they
    are exactly zero from then on. When the fit ends, hidden units and channels left without incoming or outgoing
    weights are physically removed, and the network computes the same function (WLS, arXiv 2502.07189).

    Args:
        granularity: "weight": connections of linear and convolution layers.
        amount: fraction of the candidates pruned in the end, 0 ≤ amount < 1; met exactly (±1 candidate).
        screening_weight: λ of Eq. 5: 0 ranks by magnitude alone, 1 by the F-statistic alone.
        schedule: "logistic", "one_shot", "linear", "cubic", or a callable progress ∈ [0, 1] → fraction of the amount.
        start_epoch: first epoch of the annealing window.
        end_epoch: first epoch after it, when the whole amount is pruned and fine-tuning begins; None for half of the
            training.
        scope: "global" ranks all layers together, "layer" prunes the same fraction of every layer.
        criterion: ranking metric: "screening", "magnitude", "random", or one registered by `register_criterion`.
        min_channels: candidates that every layer keeps at least; the others still meet the budget.
        include: glob patterns over module names, one of which a layer must match.
        exclude: glob patterns over module names, none of which a layer may match.
        num_classes: number of classes; None to find it in the datamodule, the module or its last linear layer.
        labels: callable batch → class indices (N,) or class weights (N, C); by default found in (x, y), in dicts with
            label/labels/target/targets/y, ….
        slim: physically remove what is dead when the fit ends.
        collect_every: gather statistics in every so many-th training batch: an F-statistic needs thousands of
            instances, not all of a large data set, and small networks notice the work.
        connections: "factored" keeps F per input of a layer, C × inputs numbers; "exact" per connection, C × weights,
            which differs by the weights' movement within an epoch.

    Raises:
        ValueError: an argument outside its range; the message names the allowed values.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = ScreeningPruningCallback(granularity="weight", amount=0.95)
        >>> trainer = Trainer(max_epochs=60, callbacks=[callback])
    """

    def __init__(
        self,
        granularity: str = "weight",
        amount: float = 0.6,
        screening_weight: float = 0.25,
        schedule: str | Schedule = "logistic",
        start_epoch: int = 0,
        end_epoch: int | None = None,
        scope: str = "global",
        criterion: str = "screening",
        min_channels: int = 1,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        num_classes: int | None = None,
        labels: Callable[[Any], Tensor] | None = None,
        slim: bool = True,
        collect_every: int = 1,
        connections: str = "factored",
    ) -> None:
        super().__init__()
        _check_choice("granularity", granularity, GRANULARITIES)
        _check_choice("scope", scope, SCOPES)
        _check_choice("connections", connections, CONNECTIONS)
        if not 0 <= amount < 1:
            raise ValueError(f"amount is the fraction pruned in the end and must lie in [0, 1), got {amount}")
        if not 0 <= screening_weight <= 1:
            raise ValueError(f"screening_weight (λ) must lie in [0, 1], got {screening_weight}")
        if min_channels < 0:
            raise ValueError(f"min_channels must not be negative, got {min_channels}")
        if collect_every < 1:
            raise ValueError(f"collect_every must be at least 1 (every batch), got {collect_every}")
        if start_epoch < 0:
            raise ValueError(f"start_epoch must not be negative, got {start_epoch}")
        if end_epoch is not None and end_epoch <= start_epoch:
            raise ValueError(f"end_epoch must lie after start_epoch={start_epoch}, got {end_epoch}")
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes must be at least 2 (the F-statistic compares classes), got {num_classes}")
        self.granularity = granularity
        self.amount = amount
        self.screening_weight = screening_weight
        self.schedule = resolve_schedule(schedule)
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.scope = scope
        self.criterion = criterion
        self.min_channels = min_channels
        self.include = include
        self.exclude = exclude
        self.num_classes = num_classes
        self.labels = labels or find_labels
        self.slim = slim
        self.collect_every = collect_every
        self.connections = connections
        self._criterion = resolve_criterion(criterion)
        # Lightning asks for it around every hook.
        self._key = self._generate_state_key(granularity=granularity, include=include, exclude=exclude)

        self.plan: SlimmingPlan | None = None
        """What was physically removed, after slimming; else None."""
        self.history: list[dict[str, float]] = []
        """Per epoch ended: epoch, scheduled and applied pruned fraction."""
        self._window = (start_epoch, end_epoch or start_epoch + 1)
        self._candidates: list[PrunableWeight] = []
        self._not_pruned: dict[str, str] = {}
        self._not_removed: str | None = None
        self._masks: Masks | None = None
        self._collector: ActivationCollector | None = None
        self._recorder: InputRecorder | None = None
        self._sizes: tuple[Size, Size] | None = None
        self._restored: dict[str, Any] = {}
        self._due: tuple[int, bool] | None = None

    # ---- start of a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what only the trainer knows: the strategy, and the window against the length of the training.

        Raises:
            NotImplementedError: an unsupported strategy.
            ValueError: end_epoch after the end of the training, or none given for a training without an end.
        """
        if stage == "fit":
            check_strategy(trainer)
            self._window = (self.start_epoch, self._resolve_end(trainer))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the candidates and register the hooks.

        Raises:
            ValueError: nothing to prune, patterns that match nothing.
        """
        self._remove_hooks()
        self._candidates, self._not_pruned = find_weights(pl_module, self.include, self.exclude)
        for name, reason in self._not_pruned.items():
            log.info("layer %r is not pruned: %s", name, reason)
        parameters = {candidate.name: candidate.weight for candidate in self._candidates}
        if self._masks is not None and self._masks.covers(parameters):  # another fit of the same model goes on
            self._restored.setdefault("kept", self._masks.kept)
        self._masks = Masks(parameters)
        if "kept" in self._restored:
            self._masks.set(self._restored.pop("kept"), trainer.optimizers)
        if "collector" in self._restored:  # resumed within an epoch, or between its last batch and its end
            state = self._restored.pop("collector")
            self._collector = self._make_collector(state["num_classes"])
            self._collector.load_state_dict(state)
        self._masks.watch(trainer.optimizers)
        self._due = None
        name, network = common_parent(pl_module, [candidate.name for candidate in self._candidates])
        self._recorder = InputRecorder(name, network)
        size = measure_size(network, None, 1)
        self._sizes = (size, size)

    def _resolve_end(self, trainer: Trainer) -> int:
        last = trainer.max_epochs
        if last is None or last < 0:
            if self.end_epoch is None:
                raise ValueError("this training has no max_epochs, so end_epoch= (when pruning is done) must be given")
            return self.end_epoch
        if getattr(trainer, "fast_dev_run", False):  # one epoch that goes through everything
            return self.start_epoch + 1
        end = max(round(_DEFAULT_WINDOW * last), self.start_epoch + 1) if self.end_epoch is None else self.end_epoch
        if end > last:
            raise ValueError(
                f"pruning would end with epoch {end} (end_epoch={self.end_epoch}, start_epoch={self.start_epoch}), but "
                f"the training has max_epochs={last}; lower end_epoch or train longer"
            )
        return end

    # ---- the training step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the sums afresh."""
        if self._collector is not None:
            self._collector.reset()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open the hooks for the forward pass, in epochs that end with pruning."""
        if self._recorder is not None and self._recorder.inputs is None:
            self._recorder.start()
        if self._collects_in(trainer.current_epoch, batch_idx):
            if self._collector is None:
                labels = self._labels_of(batch, batch_idx, trainer)
                self._collector = self._make_collector(self._find_num_classes(trainer, pl_module, labels))
            self._collector.active = True

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Close them: what runs from here on recomputes, or belongs to somebody else."""
        self._close()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Zero the gradients of pruned weights, before they are clipped by norm."""
        if self._masks is not None:
            self._masks.mask_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch's activations to the sums.

        Raises:
            ValueError: no labels in the batch, labels out of range or of the wrong form; names the batch.
        """
        self._close()
        if self._recorder is not None:
            self._recorder.stop()
        if self._collector is not None and self._collects_in(trainer.current_epoch, batch_idx):
            labels = self._labels_of(batch, batch_idx, trainer)
            with _naming_batch(batch_idx, trainer):
                self._collector.update(labels)

    def _collects_in(self, epoch: int, batch_idx: int) -> bool:
        wanted = self._criterion.needs_statistics(self.screening_weight)
        return wanted and batch_idx % self.collect_every == 0 and self._prunes_after(epoch)

    def _labels_of(self, batch: Any, batch_idx: int, trainer: Trainer) -> Tensor:
        with _naming_batch(batch_idx, trainer):
            return self.labels(batch)

    def _find_num_classes(self, trainer: Trainer, pl_module: LightningModule, labels: Tensor) -> int:
        datamodule = getattr(trainer, "datamodule", None)
        num_classes = self.num_classes or infer_num_classes(datamodule, pl_module, labels=labels)
        if num_classes is None:
            raise ValueError(f"the number of classes cannot be found in {type(pl_module).__name__}; pass num_classes=")
        return num_classes

    def _make_collector(self, num_classes: int) -> ActivationCollector:
        probes = [Probe(candidate.name, candidate.module) for candidate in self._candidates]
        exact = self._candidates if self.connections == "exact" else ()
        collector = ActivationCollector(probes, num_classes, exact)
        collector.attach()
        return collector

    def _close(self) -> None:
        if self._collector is not None:
            self._collector.active = False

    # ---- the end of an epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune to the schedule's budget for this epoch, and log what is left.

        Raises:
            ValueError: NaN or inf activations (names the layer and the batch), a layer that never ran, a budget that
                the floors make impossible; nothing is pruned then.
        """
        assert self._masks is not None
        if self._prunes_after(trainer.current_epoch):
            kept = decide_once(trainer, self._decide(trainer))
            self._masks.set(kept, trainer.optimizers)
        self._record(trainer, pl_module)

    def _decide(self, trainer: Trainer) -> Callable[[], dict[str, Tensor]]:
        """What every process contributes to the decision happens here, the decision itself in what is returned."""
        statistics: Mapping[str, FeatureStatistics] = {}
        if self._collector is not None:
            statistics = self._collector.statistics(merge_processes(trainer))
        elif self._criterion.needs_statistics(self.screening_weight):
            raise ValueError(f"epoch {trainer.current_epoch} had no training batch, so there is nothing to rank by")
        masks = self._masks
        assert masks is not None
        amount = self.amount * self._fraction(trainer.current_epoch + 1)

        def decide() -> dict[str, Tensor]:
            layers = {
                candidate.name: Ranked(
                    candidate.weight.detach(),
                    masks.kept[candidate.name],
                    self._f_of(candidate, statistics.get(candidate.name)),
                )
                for candidate in self._candidates
            }
            generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63 + trainer.current_epoch)
            scores = self._criterion.score(layers, self.screening_weight, generator)
            return rank_and_prune(scores, masks.kept, amount, scope=self.scope, min_kept=self.min_channels)

        return decide

    @staticmethod
    def _f_of(candidate: PrunableWeight, statistics: FeatureStatistics | None) -> Tensor | None:
        if statistics is None:
            return None
        f = statistics.f
        return f if f.shape == candidate.weight.shape else candidate.per_connection(f)

    def _fraction(self, completed_epochs: int) -> float:
        return scheduled_fraction(self.schedule, completed_epochs, *self._window)

    def _prunes_after(self, epoch: int) -> bool:
        """Whether the budget asks for more at the end of this epoch than was pruned when it began."""
        if self._due is None or self._due[0] != epoch:
            budget = round(self.amount * self._fraction(epoch + 1) * self._total)
            self._due = (epoch, budget > self._pruned)
        return self._due[1]

    @property
    def _total(self) -> int:
        return self._masks.total if self._masks is not None else 0

    @property
    def _pruned(self) -> int:
        return self._masks.total - self._masks.total_kept if self._masks is not None else 0

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._masks is not None
        sparsity = self._pruned / self._total
        scheduled = self.amount * self._fraction(trainer.current_epoch + 1)
        self.history.append({"epoch": trainer.current_epoch, "scheduled": scheduled, "applied": sparsity})
        pl_module.log("fscreen/sparsity", sparsity, prog_bar=True)
        totals = {name: mask.numel() for name, mask in self._masks.kept.items()}
        pl_module.log_dict({f"fscreen/kept/{name}": kept / totals[name] for name, kept in self._masks.num_kept.items()})

    # ---- the end of a fit

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let all processes end with the same buffers, as their next forward pass would, before they slim."""
        broadcast_buffers(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Physically remove what is dead (not in on_train_end, where checkpoints are still being saved)."""
        self._remove_hooks()
        if trainer.num_training_batches == 0 and not self.history:
            raise ValueError("the training dataloader is empty, so nothing was trained or pruned; check the data set")
        recorder = self._recorder
        if recorder is None or recorder.inputs is None:
            self._not_removed = (
                f"{recorder.describe() if recorder else 'the network'} was not called in training, so its inputs are "
                "not known; call the module that holds the pruned layers as a whole, self.net(x)"
            )
            if self.slim:
                log.warning("nothing was physically removed: %s", self._not_removed)
            return
        network, inputs = recorder.network, recorder.inputs_on_device()
        before = measure_size(network, inputs, recorder.instances)
        if self.slim:
            try:
                self.plan = remove_dead_units(network, *inputs)
            except (CaptureError, VerificationError) as error:  # a trained model must survive this
                self._not_removed = str(error)
                log.warning("nothing was physically removed: %s", error)
        self._sizes = (before, measure_size(network, inputs, recorder.instances))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind, also after an error."""
        if stage == "fit":
            self._remove_hooks()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind after an error."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        if self._collector is not None:
            self._collector.remove()
            self._collector = None
        if self._recorder is not None:
            self._recorder.stop()
        if self._masks is not None:
            self._masks.unwatch()

    # ---- what others ask for

    @property
    def state_key(self) -> str:
        """Tells several of these callbacks apart in a checkpoint."""
        return self._key

    @property
    def window(self) -> tuple[int, int]:
        """First epoch of the annealing window and first epoch after it, as resolved for the last fit."""
        return self._window

    @property
    def masks(self) -> dict[str, Tensor]:
        """Boolean masks of the weights by layer, at their size before slimming, True where kept."""
        return dict(self._masks.kept) if self._masks is not None else {}

    def report(self) -> PruningReport:
        """What pruning has done so far.

        Raises:
            RuntimeError: no fit has started yet.
        """
        if self._masks is None or self._sizes is None:
            raise RuntimeError("there is nothing to report before Trainer.fit has started with this callback")
        return PruningReport(
            granularity=self.granularity,
            layers=tuple(
                LayerReport(name, self._masks.kept[name].numel(), kept) for name, kept in self._masks.num_kept.items()
            ),
            before=self._sizes[0],
            after=self._sizes[1],
            removed=self._removed(),
            not_pruned=dict(self._not_pruned),
            not_removed=self._not_removed,
        )

    def _removed(self) -> dict[str, int]:
        if self.plan is None or self._recorder is None:
            return {}
        return self.plan.under(self._recorder.name).removed

    def state_dict(self) -> dict[str, Any]:
        """Masks, sums of the running epoch and history, as tensors and primitives (for `weights_only` loading)."""
        state: dict[str, Any] = {"history": [dict(entry) for entry in self.history]}
        if self._masks is not None:
            state["kept"] = dict(self._masks.kept)
        if self._collector is not None:
            state["collector"] = self._collector.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave, when the next fit starts."""
        self._restored = dict(state_dict)
        self.history = [dict(entry) for entry in state_dict["history"]]


@contextlib.contextmanager
def _naming_batch(batch_idx: int, trainer: Trainer) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"training batch {batch_idx} of epoch {trainer.current_epoch}: {error}") from error


def _check_choice(argument: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {argument} {value!r}; choose one of {list(allowed)}")
