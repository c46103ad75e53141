"""`ScreeningPruningCallback`: which Trainer hook does what. No mathematics here."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_fscreen.budget import Budget
from lightning_fscreen.channels import Feature
from lightning_fscreen.collect import FeatureStatistics
from lightning_fscreen.collection import Collection
from lightning_fscreen.compiled import Eagerly
from lightning_fscreen.criteria import Criterion, Ranked
from lightning_fscreen.distributed import broadcast_buffers, check_strategy, decide_once, gather
from lightning_fscreen.gradients import GradientStatistics
from lightning_fscreen.granularity import Patterns
from lightning_fscreen.labels import find_labels
from lightning_fscreen.optim import check_optimizers, check_state, order_of, restore_order
from lightning_fscreen.pruner import Pruner
from lightning_fscreen.ranking import Scope, check_floors
from lightning_fscreen.report import PruningReport
from lightning_fscreen.resume import resize_on_load
from lightning_fscreen.schedule import Schedule, resolve_schedule, resolve_window
from lightning_fscreen.settings import Bias, Connections, HasSettings, Settings
from lightning_fscreen.slimming import SlimmingPlan
from lightning_fscreen.surgery import LearningRates, forget_scores

log = logging.getLogger(__name__)


class ScreeningPruningCallback(HasSettings, Callback):
    """Prune a classifier while it trains, by what its activations say about the classes (F-statistic) and by magnitude.

    At the end of every epoch of the window the lowest-ranked candidates go, down to the budget of the schedule; they
    are exactly zero from then on (arXiv 2502.07189). With granularity "channel" (CLS) the network is made physically
    smaller as soon as the whole amount is pruned, and the rest of the fit trains the smaller network. With "weight"
    (WLS) hidden units and channels left without incoming or outgoing weights are removed when the fit ends. Either way
    the network computes the same function afterwards.

    Args:
        granularity: "channel": channels of batch norms; "weight": connections of linear and convolution layers.
        amount: fraction of the candidates pruned in the end, 0 ≤ amount < 1; met exactly (±1 candidate).
        screening_weight: λ of the screening criteria: 0 ranks by magnitude alone, 1 by the F-statistic alone.
        schedule: "logistic", "one_shot", "linear", "cubic", "iterative" (five rounds), "constant", or a callable
            progress ∈ [0, 1] → fraction of the amount.
        start_epoch: first epoch of the annealing window.
        end_epoch: first epoch after it, when the whole amount is pruned and fine-tuning begins; None for half of the
            training; 0 to prune at initialisation, by the first training step alone.
        scope: "global" ranks all layers together, "layer" prunes the same fraction of every layer: safer where much
            goes at once, because it leaves no layer with next to nothing.
        criterion: ranking metric: "screening", "screening_sum" (the paper's), "screening_product", "screening_rank",
            "magnitude", "activation", "gradient", "taylor", "random", or one registered by `register_criterion`.
        min_channels: candidates that every layer keeps at least; the others still meet the budget.
        include: glob patterns over module names, one of which a layer must match.
        exclude: glob patterns over module names, none of which a layer may match.
        num_classes: number of classes; None to find it in the datamodule, the module or its last linear layer.
        labels: callable batch → class indices (N,) or class weights (N, C); by default found in (x, y), in dicts with
            label/labels/target/targets/y, ….
        slim: make the network physically smaller.
        collect_every: gather statistics in every so many-th training batch; "auto" for evenly spaced ones, as many as
            the tests need for this number of classes (3,200 instances for 10 classes): see `sampling`.
        collect_epochs: epochs before each pruning over which statistics are gathered; none in the others.
        connections: "factored" keeps F per input of a layer, C × inputs numbers; "exact" per connection, C × weights,
            which differs by the weights' movement within an epoch. For weights only.
        bias: what pruned channels put out until training makes up for them: "zero" nothing (γ = β = 0); "fold" their
            shift β, carried into the layers that read them; "mean" their mean activation, likewise. For channels only.
        feature: what F is taken of, averaged over the positions: "activation", the channel behind the activation
            function that follows its batch norm, if one does; "activation_square", its square; "output" and
            "output_square", the same of the batch norm's own output. For channels only.
        rewind_lr: start the learning-rate schedules again when fine-tuning begins.
        rewind_weights: put what is left back to where it was when the fit began, learning rates too (lottery ticket).
        soft: until the window ends, zero what is ranked lowest at the end of an epoch but let it grow again (soft
            filter pruning, arXiv 1808.06866); of channels the scales γ, so that those with a positive shift can.

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
        scope: Scope = "global",
        criterion: str = "screening",
        min_channels: int = 1,
        include: Patterns = None,
        exclude: Patterns = None,
        num_classes: int | None = None,
        labels: Callable[[Any], Tensor] | None = None,
        slim: bool = True,
        collect_every: int | Literal["auto"] = "auto",
        collect_epochs: int = 1,
        connections: Connections = "factored",
        bias: Bias = "zero",
        feature: Feature = "activation",
        rewind_lr: bool = False,
        rewind_weights: bool = False,
        soft: bool = False,
    ) -> None:
        super().__init__()
        self.settings = Settings(
            granularity=granularity,
            amount=amount,
            screening_weight=screening_weight,
            schedule=resolve_schedule(schedule),
            start_epoch=start_epoch,
            end_epoch=end_epoch,
            scope=scope,
            criterion=criterion,
            min_channels=min_channels,
            include=include,
            exclude=exclude,
            num_classes=num_classes,
            labels=labels or find_labels,
            slim=slim,
            collect_every=collect_every,
            collect_epochs=collect_epochs,
            connections=connections,
            bias=bias,
            feature=feature,
            rewind_lr=rewind_lr,
            rewind_weights=rewind_weights,
            soft=soft,
        )
        # Lightning asks for it around every hook.
        self._key = self._generate_state_key(granularity=granularity, include=include, exclude=exclude)

        self.history: list[dict[str, float]] = []
        """Per epoch ended: epoch, scheduled and applied pruned fraction."""
        self._budget = Budget(amount, self.schedule, (start_epoch, end_epoch or start_epoch + 1))
        self._collection = Collection(self.labels, num_classes)
        self._pruner: Pruner | None = None
        self._rates: LearningRates | None = None
        self._eagerly: Eagerly | None = None
        self._tuning = False  # fine-tuning has begun
        self._epoch: int | None = None  # that has begun, and has not ended
        self._looks = False  # at what the network does in the running step; most steps are left alone
        self._gathers = False  # activations, in the running step
        self._first: tuple[Any, int] | None = None  # the first batch, which is to decide alone
        self._origin: dict[str, Tensor] = {}  # to rewind to
        self._restored: dict[str, Any] = {}
        self._loading: RemovableHandle | None = None

    # ---- start of a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what only the trainer knows: the strategy, and the window against the length of the training.

        From here on the model takes the size of the checkpoint that is loaded into it.

        Raises:
            NotImplementedError: an unsupported strategy or callback.
            ValueError: end_epoch after the end of the training, or none given for a training without an end.
        """
        if stage == "fit":
            check_strategy(trainer)
            fast = bool(getattr(trainer, "fast_dev_run", False))  # one epoch that goes through everything
            last = None if fast else trainer.max_epochs
            self._budget.window = resolve_window(self.start_epoch, self.end_epoch, last, fast)
        if self._loading is None:
            self._loading = resize_on_load(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the candidates.

        Raises:
            ValueError: nothing to prune, patterns that match nothing.
            NotImplementedError: an unsupported optimizer.
        """
        check_optimizers(trainer)
        state = self._restored or self._present_state(pl_module)
        self._restored = {}
        self._remove_hooks()
        self._tuning, self._epoch = bool(state.get("tuning", False)), state.get("epoch")
        self._rates, self._eagerly = LearningRates(trainer), Eagerly(pl_module)
        self._pruner = Pruner(pl_module, self.settings, state.get("pruner", {}), self._met)
        self._budget.total = self._pruner.total
        self._budget.target = state.get("target", self._pruner.pruned)
        if not self._pruner.granularity.slims_in_fit:
            self._check_floors()
        if "optimizers" in state:
            restore_order(trainer.optimizers, pl_module, state["optimizers"])
        self._pruner.watch(trainer.optimizers)
        # Resumed within an epoch, or between its last batch and its end.
        granularity = self._pruner.granularity
        self._collection.stride = state.get("stride")
        sums = state.get("collections", [])
        self._collection.load_state(trainer, sums, granularity.collector, granularity.gradients)
        if self.rewind_weights and not self._tuning:
            self._origin = state.get("origin") or copy.deepcopy(_tensors(pl_module))
        if self.plan is not None and self._budget.asks_for_more(self._budget.window[1]):
            log.warning(
                "the network was made smaller in an earlier fit, so no more is pruned in this one; to prune more, "
                "train with a new ScreeningPruningCallback"
            )

    def _present_state(self, pl_module: LightningModule) -> dict[str, Any]:
        """What another fit of the same model goes on from; empty for a new one."""
        state = self._pruner.present_state(pl_module) if self._pruner is not None else {}
        return {"pruner": state, "target": self._budget.target} if state else {}

    def _met(self) -> None:
        """The network is being called for the first time, and its candidates are known."""
        assert self._pruner is not None
        self._budget.total = self._pruner.total
        self._check_floors()
        if self._gathers:
            self._collection.open(self._pruner.granularity.collector)

    def _check_floors(self) -> None:
        if self._pruner is not None and self.plan is None:
            totals = {name: mask.numel() for name, mask in self._pruner.kept.items()}
            check_floors(totals, self.amount, self.min_channels)

    @property
    def _criterion(self) -> Criterion:
        return self.settings.resolved_criterion

    # ---- the training step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the sums afresh; when the whole amount is pruned, begin to fine-tune the smaller network."""
        self._begin_epoch(trainer, pl_module)

    def _begin_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Resumed from a checkpoint between the last batch of an epoch and its end, a training begins with the first
        # batch of the next one: Lightning calls neither hook.
        epoch = trainer.current_epoch
        if self._epoch is not None and self._epoch < epoch:
            self._end_epoch(trainer, self._epoch)
        self._epoch = epoch
        if not self._collects(epoch):
            self._collection.end()
        if self._tuning or epoch < self._budget.window[1] or self._prunes_after(epoch):
            return
        assert self._pruner is not None
        if self._pruner.granularity.slims_in_fit and self._pruner.recorder.inputs is None:
            return  # resumed with inputs that no checkpoint can hold: known after one more batch
        self._tuning = True
        if self.rewind_weights:
            self._pruner.rewind(self._origin, trainer.optimizers)
            self._origin = {}
        if self._pruner.granularity.slims_in_fit:
            self._slim(trainer)
        forget_scores(trainer)
        if (self.rewind_lr or self.rewind_weights) and self._rates is not None:
            self._rates.rewind(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open the hooks for the forward pass, in epochs that end with pruning."""
        if self._epoch != trainer.current_epoch:
            self._begin_epoch(trainer, pl_module)
        assert self._pruner is not None and self._eagerly is not None
        unknown = self._pruner.recorder.inputs is None
        self._gathers = self._wants_activations and self._collects(trainer.current_epoch)
        if self._gathers:
            self._collection.find_classes(trainer, pl_module, batch, batch_idx)
            self._gathers = self._collection.is_due(trainer, batch, batch_idx, self.collect_every, self.collect_epochs)
        at_start = self._budget.window[1] == 0 and self._prunes_after(trainer.current_epoch)
        self._first = (batch, batch_idx) if at_start else None
        self._looks = unknown or self._gathers
        if self._looks:
            self._eagerly.start()
        if unknown:
            self._pruner.recorder.start()
        if self._gathers and not (unknown and self._pruner.granularity.slims_in_fit):  # or else as soon as it is known
            self._collection.open(self._pruner.granularity.collector)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Close them: what runs from here on recomputes, or belongs to somebody else."""
        if self._looks:
            self._close()

    def _close(self) -> None:
        self._collection.close()
        if self._eagerly is not None:
            self._eagerly.stop()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Zero the gradients of pruned weights, before they are clipped by norm; gather the others."""
        if self._pruner is None:
            return
        self._pruner.mask_gradients()
        if self._criterion.needs_gradients and self._collects(trainer.current_epoch):
            self._collection.add_gradients(self._pruner.granularity.gradients, optimizer)
        if self._first is not None:
            batch, batch_idx = self._first
            self._add(trainer, batch, batch_idx)
            self._prune(trainer, trainer.current_epoch)
            self._pruner.mask_gradients()
            self._gathers, self._first = False, None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch's activations to the sums.

        Raises:
            ValueError: no labels in the batch, labels out of range or of the wrong form; names the batch.
        """
        if self._looks:
            self._close()
            self._add(trainer, batch, batch_idx)

    def _add(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        assert self._pruner is not None
        recorder = self._pruner.recorder
        recorder.stop()
        if recorder.inputs is None and self._pruner.granularity.slims_in_fit:
            raise ValueError(
                f"{recorder.describe()} was not called in training_step, so it is not known how its layers are "
                "connected; call the module that holds them as a whole, self.net(x)"
            )
        if self._gathers:
            self._collection.add(trainer, batch, batch_idx)

    @property
    def _wants_activations(self) -> bool:
        return self.settings.needs_activations

    def _collects(self, epoch: int) -> bool:
        wanted = self._wants_activations or self._criterion.needs_gradients
        return wanted and any(self._prunes_after(last) for last in range(epoch, epoch + self.collect_epochs))

    # ---- the end of an epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune to the schedule's budget for this epoch, and log what is left.

        Raises:
            ValueError: NaN or inf activations (names the layer and the batch), a layer that never ran, a budget that
                the floors make impossible; nothing is pruned then.
        """
        self._end_epoch(trainer, trainer.current_epoch)
        self._log(pl_module)

    def _end_epoch(self, trainer: Trainer, epoch: int) -> None:
        assert self._pruner is not None
        self._pruner.apply_masks()  # somebody may have changed gradients after us
        if self._prunes_after(epoch):
            self._prune(trainer, epoch)
        self._epoch = None
        applied = self._pruner.pruned / self._pruner.total
        self.history.append({"epoch": epoch, "scheduled": self._budget.fraction(epoch), "applied": applied})

    def _prune(self, trainer: Trainer, epoch: int) -> None:
        assert self._pruner is not None
        if self.slim and self._pruner.granularity.slims_in_fit:
            check_state(trainer.optimizers, self._pruner.parameters)
        statistics, gradients = self._collection.statistics(trainer), self._collection.gradients()
        if not statistics and self._criterion.needs_statistics(self.screening_weight):
            raise ValueError(f"epoch {epoch} had no training batch, so there is nothing to rank by")
        if not gradients and self._criterion.needs_gradients:
            raise ValueError(f"epoch {epoch} had no optimizer step, so there are no gradients to rank by")
        if self._criterion.explain is not None:
            ranked = self._pruner.ranked(statistics, gradients)
            self._pruner.note_evidence(self._criterion.explain(ranked, self.screening_weight))
        kept = decide_once(trainer, lambda: self._decide(epoch, statistics, gradients))
        hold = not self.soft or epoch + 1 >= self._budget.window[1]
        self._pruner.prune(kept, statistics, trainer, hold)
        if hold:
            self._budget.met(epoch)
        self._collection.reset()

    def _decide(
        self,
        epoch: int,
        statistics: Mapping[str, FeatureStatistics],
        gradients: Mapping[str, GradientStatistics],
    ) -> dict[str, Tensor]:
        assert self._pruner is not None
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63 + epoch)

        def score(ranked: Mapping[str, Ranked]) -> Mapping[str, Tensor]:
            return self._criterion.score(ranked, self.screening_weight, generator)

        fraction = self._budget.fraction(epoch)
        return self._pruner.rank(score, statistics, gradients, fraction, self.scope, self.min_channels)

    def _prunes_after(self, epoch: int) -> bool:
        return self.plan is None and self._budget.asks_for_more(epoch)

    def _log(self, pl_module: LightningModule) -> None:
        assert self._pruner is not None
        pruner = self._pruner
        pl_module.log("fscreen/sparsity", pruner.pruned / pruner.total, prog_bar=True)
        metrics = {f"fscreen/kept/{name}": kept / pruner.kept[name].numel() for name, kept in pruner.num_kept.items()}
        if pruner.granularity.slims_in_fit:
            kept = sum(pruner.num_kept.values())
            metrics |= {f"fscreen/{pruner.granularity.noun}": kept, "fscreen/params": pruner.size.params}
            metrics |= {} if pruner.size.macs is None else {"fscreen/macs": pruner.size.macs}
        pl_module.log_dict({name: float(value) for name, value in metrics.items()})

    # ---- slimming, and the end of a fit

    def _slim(self, trainer: Trainer) -> None:
        assert self._pruner is not None
        plan = self._pruner.slim(trainer) if self.slim and self.plan is None else None
        if plan is None:
            return
        if self._eagerly is not None:
            self._eagerly.recompile()
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, ScreeningPruningCallback) and other is not self and other._pruner is not None:
                other._pruner.follow(plan)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let all processes end with the same buffers, as their next forward pass would, before they slim."""
        broadcast_buffers(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Physically remove what is dead (not in on_train_end, where checkpoints are still being saved)."""
        if self._epoch is not None and self._epoch < trainer.current_epoch:
            self._end_epoch(trainer, self._epoch)  # resumed when nothing but this was left to do
        self._remove_hooks()
        if trainer.num_training_batches == 0 and not self.history:
            raise ValueError("the training dataloader is empty, so nothing was trained or pruned; check the data set")
        assert self._pruner is not None
        self._pruner.reattach()
        if self._prunes_after(self._budget.window[1]) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            log.warning(
                "training ended with epoch %d, before everything was pruned (end_epoch=%d): %.1f %% of the candidates "
                "are, %.1f %% were asked for; train longer, set end_epoch earlier, or make EarlyStopping more patient",
                trainer.current_epoch - 1,
                self._budget.window[1],
                100 * self._pruner.pruned / self._pruner.total,
                100 * self.amount,
            )
        recorder = self._pruner.recorder
        if recorder.inputs is None:
            self._pruner.not_removed = (
                f"{recorder.describe()} was not called in training, so its inputs are "
                "not known; call the module that holds the pruned layers as a whole, self.net(x)"
            )
            if self.slim:
                log.warning("nothing was physically removed: %s", self._pruner.not_removed)
            return
        self._pruner.measure()
        # Without an epoch of fine-tuning, not even what can be slimmed in the fit has been.
        if not self._pruner.granularity.slims_in_fit or self._pruner.pruned:
            self._slim(trainer)
            self._remove_hooks()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind, also after an error."""
        self._remove_hooks()
        if self._loading is not None:
            self._loading.remove()
            self._loading = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind after an error."""
        self.teardown(trainer, pl_module, "fit")

    def _remove_hooks(self) -> None:
        self._close()
        self._collection.end()
        if self._pruner is not None:
            self._pruner.unwatch()

    # ---- what others ask for

    @property
    def fine_tuning(self) -> bool:
        """Whether the whole amount is pruned, and what is left is being trained."""
        return self._tuning

    @property
    def state_key(self) -> str:
        """Tells several of these callbacks apart in a checkpoint."""
        return self._key

    @property
    def plan(self) -> SlimmingPlan | None:
        """What was physically removed, with names as in the module, after slimming; else None."""
        return self._pruner.plan if self._pruner is not None else None

    @property
    def window(self) -> tuple[int, int]:
        """First epoch of the annealing window and first epoch after it, as resolved for the last fit."""
        return self._budget.window

    @property
    def masks(self) -> dict[str, Tensor]:
        """Boolean masks of the candidates by layer, at their size before slimming, True where kept."""
        return dict(self._pruner.kept) if self._pruner is not None else {}

    def report(self) -> PruningReport:
        """What pruning has done so far.

        Raises:
            RuntimeError: no fit has started yet.
        """
        if self._pruner is None:
            raise RuntimeError("there is nothing to report before Trainer.fit has started with this callback")
        return self._pruner.report()

    def state_dict(self) -> dict[str, Any]:
        """Masks, plan and history, as tensors and primitives (for `weights_only` loading)."""
        state: dict[str, Any] = {"history": [dict(entry) for entry in self.history], "tuning": self._tuning}
        state |= {"target": self._budget.target, "epoch": self._epoch, "stride": self._collection.stride}
        state |= {"origin": self._origin} if self._origin else {}
        return state if self._pruner is None else state | {"pruner": self._pruner.state_dict()}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what is different in every process, the sums of the running epoch, and the order of the parameters."""
        own = checkpoint.get("callbacks", {}).get(self.state_key)
        if own is not None:
            own["collections"] = gather(trainer, self._collection.state_dict())
            own["optimizers"] = order_of(trainer.optimizers, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave, when the next fit starts."""
        self._restored = dict(state_dict)
        self.history = [dict(entry) for entry in state_dict["history"]]


def _tensors(model: LightningModule) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
