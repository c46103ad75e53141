"""`ScreeningPruningCallback`: which Trainer hook does what. No mathematics here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer

from lightning_fscreen.budget import Budget
from lightning_fscreen.collect import FeatureStatistics
from lightning_fscreen.collection import Collection
from lightning_fscreen.criteria import resolve_criterion
from lightning_fscreen.distributed import broadcast_buffers, check_strategy, decide_once
from lightning_fscreen.granularity import Channels, Granularity, Weights
from lightning_fscreen.labels import find_labels
from lightning_fscreen.masks import Masks
from lightning_fscreen.network import InputRecorder, common_parent, enclosing
from lightning_fscreen.ranking import SCOPES
from lightning_fscreen.report import LayerReport, PruningReport, Size, measure_size
from lightning_fscreen.schedule import Schedule, resolve_schedule, resolve_window
from lightning_fscreen.slimming import CaptureError, SlimmingPlan, VerificationError, remove_dead_units
from lightning_fscreen.surgery import LearningRates, slim_in_fit

log = logging.getLogger(__name__)

GRANULARITIES = ("channel", "weight")
CONNECTIONS = ("factored", "exact")
BIASES = ("zero", "fold", "mean")


class ScreeningPruningCallback(Callback):
    """Prune a classifier while it trains, by what its activations say about the classes (F-statistic) and by magnitude.

    At the end of every epoch of the window the lowest-ranked candidates go, down to the budget of the schedule; they
    are exactly zero from then on (arXiv 2502.07189). With granularity "channel" (CLS) the network is made physically
    smaller as soon as the whole amount is pruned, and the rest of the fit trains the smaller network. With "weight"
    (WLS) hidden units and channels left without incoming or outgoing weights are removed when the fit ends. Either way
    the network computes the same function afterwards.

    Args:
        granularity: "channel": channels of batch norms; "weight": connections of linear and convolution layers.
        amount: fraction of the candidates pruned in the end, 0 ≤ amount < 1; met exactly (±1 candidate).
        screening_weight: λ of Eq. 5/6: 0 ranks by magnitude alone, 1 by the F-statistic alone.
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
        slim: make the network physically smaller.
        collect_every: gather statistics in every so many-th training batch: an F-statistic needs thousands of
            instances, not all of a large data set, and small networks notice the work.
        collect_epochs: epochs before each pruning over which statistics are gathered; none in the others.
        connections: "factored" keeps F per input of a layer, C × inputs numbers; "exact" per connection, C × weights,
            which differs by the weights' movement within an epoch. For weights only.
        bias: what pruned channels put out until training makes up for them: "zero" nothing (γ = β = 0); "fold" their
            shift β, carried into the layers that read them; "mean" their mean activation, likewise. For channels only.
        rewind_lr: start the learning-rate schedules again when fine-tuning begins.

    Raises:
        ValueError: an argument outside its range; the message names the allowed values.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = ScreeningPruningCallback(amount=0.6)
        >>> trainer = Trainer(max_epochs=160, callbacks=[callback])
    """

    def __init__(
        self,
        granularity: str = "channel",
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
        collect_epochs: int = 1,
        connections: str = "factored",
        bias: str = "zero",
        rewind_lr: bool = False,
    ) -> None:
        super().__init__()
        _check_choice("granularity", granularity, GRANULARITIES)
        _check_choice("scope", scope, SCOPES)
        _check_choice("connections", connections, CONNECTIONS)
        _check_choice("bias", bias, BIASES)
        if not 0 <= amount < 1:
            raise ValueError(f"amount is the fraction pruned in the end and must lie in [0, 1), got {amount}")
        if not 0 <= screening_weight <= 1:
            raise ValueError(f"screening_weight (λ) must lie in [0, 1], got {screening_weight}")
        if min_channels < 0:
            raise ValueError(f"min_channels must not be negative, got {min_channels}")
        if collect_every < 1:
            raise ValueError(f"collect_every must be at least 1 (every batch), got {collect_every}")
        if collect_epochs < 1:
            raise ValueError(f"collect_epochs must be at least 1 (the epoch before a pruning), got {collect_epochs}")
        if granularity == "channel" and connections == "exact":
            raise ValueError(
                'connections="exact" is for granularity="weight"; channels have no connections of their own'
            )
        if granularity == "weight" and bias != "zero":
            raise ValueError(f'bias={bias!r} is for granularity="channel"; pruned weights are zero')
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
        self.collect_epochs = collect_epochs
        self.connections = connections
        self.bias = bias
        self.rewind_lr = rewind_lr
        self._criterion = resolve_criterion(criterion)
        # Lightning asks for it around every hook.
        self._key = self._generate_state_key(granularity=granularity, include=include, exclude=exclude)

        self.plan: SlimmingPlan | None = None
        """What was physically removed, after slimming; else None. For channels with names as in the module."""
        self.history: list[dict[str, float]] = []
        """Per epoch ended: epoch, scheduled and applied pruned fraction."""
        self._budget = Budget(amount, self.schedule, (start_epoch, end_epoch or start_epoch + 1))
        self._collection = Collection(self.labels, num_classes)
        self._granularity: Granularity | None = None
        self._not_removed: str | None = None
        self._masks: Masks | None = None
        self._kept: dict[str, Tensor] = {}  # at full size, also after slimming
        self._num_kept: dict[str, int] = {}
        self._recorder: InputRecorder | None = None
        self._rates: LearningRates | None = None
        self._tuning = False  # fine-tuning has begun
        self._sizes: tuple[Size, Size] | None = None
        self._restored: dict[str, Any] = {}

    # ---- start of a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what only the trainer knows: the strategy, and the window against the length of the training.

        Raises:
            NotImplementedError: an unsupported strategy.
            ValueError: end_epoch after the end of the training, or none given for a training without an end.
        """
        if stage == "fit":
            check_strategy(trainer)
            fast = bool(getattr(trainer, "fast_dev_run", False))  # one epoch that goes through everything
            last = None if fast else trainer.max_epochs
            self._budget.amount, self._budget.schedule = self.amount, self.schedule  # they may have been set since
            self._budget.window = resolve_window(self.start_epoch, self.end_epoch, last, fast)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the candidates.

        Raises:
            ValueError: nothing to prune, patterns that match nothing.
        """
        self._remove_hooks()
        self._not_removed = None
        self._tuning = bool(self._restored.pop("tuning", False))
        self._rates = LearningRates(trainer)
        if self._slimmed_already(pl_module):  # another fit of the same model goes on
            self._start_masks(trainer)
            return
        self.plan = None
        if self.granularity == "channel":
            self._granularity = Channels(pl_module, self.include, self.exclude, self.bias)
        else:
            self._granularity = Weights(pl_module, self.include, self.exclude, self.connections == "exact")
        for name, reason in self._granularity.not_pruned.items():
            log.info("layer %r is not pruned: %s", name, reason)
        name, network = common_parent(pl_module, self._granularity.names)
        size = measure_size(network, None, 1)
        self._sizes = (size, size)
        if self.granularity == "weight":
            self._recorder = InputRecorder([(name, network)])
        else:  # what reads the last channels must be part of the network
            self._recorder = InputRecorder(enclosing(pl_module, name), on_inputs=lambda: self._meet(trainer))
            if self._restored.get("inputs") is not None:
                self._recorder.name = self._restored["network"]
                self._recorder.network = pl_module.get_submodule(self._recorder.name)
                self._recorder.inputs = self._restored.pop("inputs")
                self._meet_network()
        self._use_masks(self._granularity.masks(), trainer)
        # Resumed within an epoch, or between its last batch and its end.
        self._collection.load_state_dict(self._restored.pop("collection", {}), self._granularity.collector)

    def _slimmed_already(self, pl_module: LightningModule) -> bool:
        if self.granularity != "channel" or self.plan is None or self._recorder is None:
            return False
        return any(module is self._recorder.network for module in pl_module.modules())

    def _use_masks(self, masks: Masks, trainer: Trainer) -> None:
        """Work with fresh masks from now on, taking over what is pruned already."""
        if self._masks is not None and self._masks.covers(masks):  # another fit of the same model goes on
            self._restored.setdefault("kept", self._masks.kept)
        if self._masks is not None:
            self._masks.unwatch()
        self._masks = masks
        if "kept" in self._restored and self._restored["kept"].keys() == masks.kept.keys():
            masks.set(self._restored.pop("kept"), trainer.optimizers)
        self._kept, self._num_kept = dict(masks.kept), dict(masks.num_kept)
        self._budget.total, self._budget.target = masks.total, self._restored.pop("target", self._pruned)
        self._start_masks(trainer)

    def _start_masks(self, trainer: Trainer) -> None:
        assert self._masks is not None
        self._masks.unwatch()
        self._masks.watch(trainer.optimizers)

    def _meet(self, trainer: Trainer) -> None:
        """The network is being called for the first time: go on with what it turns out to be."""
        names = self._granularity.names if self._granularity is not None else []
        self._meet_network()
        assert self._granularity is not None
        if self._granularity.names != names:
            self._use_masks(self._granularity.masks(), trainer)
        if self._collects_in(trainer.current_epoch, 0):
            self._collection.open(self._granularity.collector)

    def _meet_network(self) -> None:
        assert self._granularity is not None and self._recorder is not None
        known = set(self._granularity.not_pruned)
        self._granularity.meet(self._recorder)
        for name, reason in self._granularity.not_pruned.items():
            if name not in known:
                log.info("layer %r is not pruned: %s", name, reason)
        size = measure_size(self._recorder.network, self._recorder.inputs_on_device(), self._recorder.instances)
        self._sizes = (size, size)

    # ---- the training step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the sums afresh; when the whole amount is pruned, begin to fine-tune the smaller network."""
        if not self._collects(trainer.current_epoch):
            self._collection.end()
        if self._tuning or trainer.current_epoch < self._budget.window[1] or self._prunes_after(trainer.current_epoch):
            return
        self._tuning = True
        if self.granularity == "channel" and self._recorder is not None and self._recorder.inputs is not None:
            self._slim_channels(trainer, pl_module)
        if self.rewind_lr and self._rates is not None:
            self._rates.rewind(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open the hooks for the forward pass, in epochs that end with pruning."""
        unknown = self._recorder is not None and self._recorder.inputs is None
        if self._recorder is not None and unknown:
            self._recorder.start()
        if self._collects_in(trainer.current_epoch, batch_idx):
            self._collection.find_classes(trainer, pl_module, batch, batch_idx)
            if not unknown or self.granularity == "weight":
                assert self._granularity is not None
                self._collection.open(self._granularity.collector)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Close them: what runs from here on recomputes, or belongs to somebody else."""
        self._collection.close()

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
        self._collection.close()
        if self._recorder is not None:
            self._recorder.stop()
            if self._recorder.inputs is None and self.granularity == "channel":
                raise ValueError(
                    f"{self._recorder.describe()} was not called in training_step, so it is not known how its batch "
                    "norms are connected; call the module that holds them as a whole, self.net(x)"
                )
        if self._collects_in(trainer.current_epoch, batch_idx):
            self._collection.add(trainer, batch, batch_idx)

    def _collects_in(self, epoch: int, batch_idx: int) -> bool:
        return batch_idx % self.collect_every == 0 and self._collects(epoch)

    def _collects(self, epoch: int) -> bool:
        wanted = self._criterion.needs_statistics(self.screening_weight) or self.bias == "mean"
        return wanted and any(self._prunes_after(last) for last in range(epoch, epoch + self.collect_epochs))

    # ---- the end of an epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune to the schedule's budget for this epoch, and log what is left.

        Raises:
            ValueError: NaN or inf activations (names the layer and the batch), a layer that never ran, a budget that
                the floors make impossible; nothing is pruned then.
        """
        if self._prunes_after(trainer.current_epoch):
            assert self._masks is not None and self._granularity is not None
            statistics = self._statistics(trainer)
            before = self._masks.kept
            kept = decide_once(trainer, lambda: self._decide(trainer, statistics))
            self._masks.set(kept, trainer.optimizers)
            self._granularity.after_pruning(before, self._masks.kept, statistics)
            self._kept, self._num_kept = dict(self._masks.kept), dict(self._masks.num_kept)
            self._budget.met(trainer.current_epoch)
            self._collection.reset()
        self._record(trainer, pl_module)

    def _statistics(self, trainer: Trainer) -> Mapping[str, FeatureStatistics]:
        statistics = self._collection.statistics(trainer)
        if not statistics and self._criterion.needs_statistics(self.screening_weight):
            raise ValueError(f"epoch {trainer.current_epoch} had no training batch, so there is nothing to rank by")
        return statistics

    def _decide(self, trainer: Trainer, statistics: Mapping[str, FeatureStatistics]) -> dict[str, Tensor]:
        assert self._masks is not None and self._granularity is not None
        kept = self._masks.kept
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63 + trainer.current_epoch)
        scores = self._criterion.score(self._granularity.ranked(kept, statistics), self.screening_weight, generator)
        amount = self._budget.fraction(trainer.current_epoch)
        return self._granularity.prune(scores, kept, amount, self.scope, self.min_channels)

    def _prunes_after(self, epoch: int) -> bool:
        slimmed = self.granularity == "channel" and self.plan is not None
        return not slimmed and self._budget.asks_for_more(epoch)

    @property
    def _pruned(self) -> int:
        return sum(mask.numel() for mask in self._kept.values()) - sum(self._num_kept.values())

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sparsity, scheduled = self._pruned / self._budget.total, self._budget.fraction(trainer.current_epoch)
        self.history.append({"epoch": trainer.current_epoch, "scheduled": scheduled, "applied": sparsity})
        pl_module.log("fscreen/sparsity", sparsity, prog_bar=True)
        metrics = {f"fscreen/kept/{name}": kept / self._kept[name].numel() for name, kept in self._num_kept.items()}
        if self.granularity == "channel" and self._sizes is not None:
            size = self._sizes[1]
            metrics |= {"fscreen/channels": sum(self._num_kept.values()), "fscreen/params": size.params}
            metrics |= {} if size.macs is None else {"fscreen/macs": size.macs}
        pl_module.log_dict({name: float(value) for name, value in metrics.items()})

    # ---- slimming

    def _slim_channels(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the network smaller in the middle of the fit; what stays switched off is masked on."""
        recorder, channels = self._recorder, self._granularity
        assert recorder is not None and isinstance(channels, Channels) and channels.captured is not None
        if not self.slim or self.plan is not None:
            return
        bias = "zero" if self.bias == "zero" else "fold"
        try:
            self.plan = slim_in_fit(trainer, pl_module, recorder, channels.captured, self._kept, bias)
        except VerificationError as error:  # a model in training must survive this
            self._not_removed = str(error)
            log.warning("nothing was physically removed, the masks stay: %s", error)
            return
        if self._masks is not None:
            self._masks.unwatch()
        self._masks = channels.masks()
        plan = self.plan
        self._masks.set(
            {name: plan.cut(f"{name}.weight", mask) for name, mask in self._kept.items()}, trainer.optimizers
        )
        self._start_masks(trainer)
        size = measure_size(recorder.network, recorder.inputs_on_device(), recorder.instances)
        before = self._sizes[0] if self._sizes else size
        self._sizes = (before, size)
        log.info("slimmed: %s → %s parameters, %s → %s MACs", before.params, size.params, before.macs, size.macs)

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
        if self.granularity == "channel":
            if self.plan is None and self._pruned and self._not_removed is None:  # no epoch of fine-tuning came
                self._slim_channels(trainer, pl_module)
                self._remove_hooks()
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
        self._collection.end()
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
        return self._budget.window

    @property
    def masks(self) -> dict[str, Tensor]:
        """Boolean masks of the candidates by layer, at their size before slimming, True where kept."""
        return dict(self._kept)

    def report(self) -> PruningReport:
        """What pruning has done so far.

        Raises:
            RuntimeError: no fit has started yet.
        """
        if self._granularity is None or self._sizes is None:
            raise RuntimeError("there is nothing to report before Trainer.fit has started with this callback")
        return PruningReport(
            granularity=self.granularity,
            layers=tuple(LayerReport(name, mask.numel(), self._num_kept[name]) for name, mask in self._kept.items()),
            before=self._sizes[0],
            after=self._sizes[1],
            removed=self._removed(),
            not_pruned=dict(self._granularity.not_pruned),
            not_removed=self._not_removed,
        )

    def _removed(self) -> dict[str, int]:
        if self.plan is None or self._recorder is None:
            return {}
        return dict(
            self.plan.removed if self.granularity == "channel" else self.plan.under(self._recorder.name).removed
        )

    def state_dict(self) -> dict[str, Any]:
        """Masks, sums of the running epoch and history, as tensors and primitives (for `weights_only` loading)."""
        state: dict[str, Any] = {"history": [dict(entry) for entry in self.history], "kept": dict(self._kept)}
        state |= {"target": self._budget.target, "tuning": self._tuning, "collection": self._collection.state_dict()}
        if self._recorder is not None and self.granularity == "channel":
            state["network"], state["inputs"] = self._recorder.name, self._recorder.plain_inputs()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave, when the next fit starts."""
        self._restored = dict(state_dict)
        self.history = [dict(entry) for entry in state_dict["history"]]


def _check_choice(argument: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {argument} {value!r}; choose one of {list(allowed)}")
