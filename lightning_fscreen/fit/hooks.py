"""The Trainer's hooks for epochs and training steps. The decisions are those of `phases`; no mathematics here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_fscreen.fit.distributed import decide_once
from lightning_fscreen.fit.gathering import Collection
from lightning_fscreen.fit.optim import check_state
from lightning_fscreen.fit.phases import IDLE, Progress, gathers, holds, next_phase, plan_step
from lightning_fscreen.fit.pruner import Pruner
from lightning_fscreen.fit.report import metrics_of
from lightning_fscreen.fit.settings import HasSettings, Settings
from lightning_fscreen.fit.surgery import forget_scores
from lightning_fscreen.ranking.budget import Budget
from lightning_fscreen.ranking.budgeted import check_floors
from lightning_fscreen.slimming import SlimmingPlan

log = logging.getLogger(__name__)


class TrainingHooks(HasSettings, Callback):
    """The part of `ScreeningPruningCallback` that acts in epochs and training steps.

    Args:
        settings: the callback's arguments.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.history: list[dict[str, float]] = []
        """Per epoch ended: epoch, scheduled and applied pruned fraction."""
        self._budget = Budget(self.amount, self.schedule, (self.start_epoch, self.end_epoch or self.start_epoch + 1))
        self._collection = Collection(self.settings)
        self._progress = Progress()
        self._pruner: Pruner | None = None
        self._restored: dict[str, Any] = {}  # the state that the next fit goes on from
        self._loading: RemovableHandle | None = None

    def _set_total(self) -> None:
        """Tell the budget the number of candidates; if they are final, check that the floors leave enough to prune."""
        pruner = self._fit_pruner
        self._budget.total = pruner.total
        if pruner.is_ready and pruner.plan is None:
            check_floors(
                {name: mask.numel() for name, mask in pruner.masks.kept.items()}, self.amount, self.min_channels
            )

    @property
    def _fit_pruner(self) -> Pruner:
        assert self._pruner is not None, "no fit has started"
        return self._pruner

    # ---- the training step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the sums afresh; when the whole amount is pruned, begin to fine-tune the smaller network."""
        self._begin_epoch(trainer)

    def _begin_epoch(self, trainer: Trainer) -> None:
        # Resumed from a checkpoint between the last batch of an epoch and its end, a training begins with the first
        # batch of the next one: Lightning calls neither hook.
        progress, epoch = self._progress, trainer.current_epoch
        if progress.open_epoch is not None and progress.open_epoch < epoch:
            self._end_epoch(trainer, progress.open_epoch)
        progress.open_epoch = epoch
        if not gathers(self.settings, self._budget, epoch):
            self._collection.end()
        # Resumed with inputs that no checkpoint can hold, the pruner is ready after one more batch.
        phase = next_phase(progress.phase, self._budget, epoch, self._fit_pruner.is_ready)
        if phase is not progress.phase:
            progress.phase = phase
            self._begin_fine_tuning(trainer)

    def _begin_fine_tuning(self, trainer: Trainer) -> None:
        pruner = self._fit_pruner
        if self.rewind_weights:
            pruner.rewind_weights(trainer.optimizers)
        if pruner.granularity.slims_in_fit:
            self._slim(trainer)
        forget_scores(trainer)
        if self.rewind_lr or self.rewind_weights:
            pruner.origin.rewind_rates(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open the hooks for the forward pass, in epochs that end with pruning."""
        epoch = trainer.current_epoch
        if self._progress.open_epoch != epoch:
            self._begin_epoch(trainer)
        pruner, collection = self._fit_pruner, self._collection
        known = pruner.recorder.inputs is not None
        step = plan_step(self.settings, self._budget, epoch, batch_idx, known, collection.stride)
        if step.gather and not collection.is_prepared:
            collection.prepare(trainer, pl_module, batch, batch_idx)
            step = plan_step(self.settings, self._budget, epoch, batch_idx, known, collection.stride)
        self._progress.step = step
        if step.observes:
            pruner.eagerly.start()
        if step.record:
            pruner.recorder.start(self._on_network_call)
        if step.gather:
            collection.begin(batch, batch_idx)
            if pruner.is_ready:
                collection.open(pruner.granularity.collector)

    def _on_network_call(self, name: str, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A module that may be the network is about to run: learn from its inputs, and gather its activations."""
        pruner = self._fit_pruner
        if pruner.learn(name, network, args, kwargs):
            self._set_total()
            if self._progress.step.gather:
                self._collection.open(pruner.granularity.collector)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remove the forward hooks: the backward pass may run layers again (activation checkpointing)."""
        if self._progress.step.observes:
            self._close()

    def _close(self) -> None:
        self._collection.close()
        self._fit_pruner.eagerly.stop()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Zero the gradients of pruned weights, before they are clipped by norm; gather the others."""
        if self._pruner is None:
            return
        self._pruner.masks.mask_gradients()
        step = self._progress.step
        if step.gather_gradients:
            self._collection.add_gradients(self._pruner.granularity.gradients, optimizer)
        if step.prunes_now:
            self._close()
            self._add(trainer)
            self._prune(trainer, trainer.current_epoch)
            self._pruner.masks.mask_gradients()
            self._progress.step = IDLE

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch's activations to the sums.

        Raises:
            ValueError: no labels in the batch, labels out of range or of the wrong form; names the batch.
        """
        if self._progress.step.observes:
            self._close()
            self._add(trainer)

    def _add(self, trainer: Trainer) -> None:
        pruner = self._fit_pruner
        pruner.recorder.stop()
        if not pruner.is_ready:
            raise ValueError(
                f"{pruner.recorder.describe()} was not called in training_step, so it is not known how its layers are "
                "connected; call the module that holds them as a whole, self.net(x)"
            )
        if self._progress.step.gather:
            self._collection.add(trainer)

    # ---- the end of an epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune to the schedule's budget for this epoch, and log the remaining size.

        Raises:
            ValueError: NaN or inf activations (names the layer and the batch), a layer that never ran, a budget that
                the floors make impossible; nothing is pruned then.
        """
        self._end_epoch(trainer, trainer.current_epoch)
        pl_module.log("fscreen/sparsity", self._fit_pruner.pruned_fraction, prog_bar=True)
        pl_module.log_dict(metrics_of(self._fit_pruner.report(), type(self._fit_pruner.granularity)))

    def _end_epoch(self, trainer: Trainer, epoch: int) -> None:
        pruner = self._fit_pruner
        pruner.masks.apply()  # somebody may have changed gradients after us
        if self._budget.asks_for_more(epoch):
            self._prune(trainer, epoch)
        self._progress.open_epoch = None
        scheduled = self._budget.fraction(epoch)
        self.history.append({"epoch": epoch, "scheduled": scheduled, "applied": pruner.pruned_fraction})

    def _prune(self, trainer: Trainer, epoch: int) -> None:
        pruner, settings = self._fit_pruner, self.settings
        if self.slim and pruner.granularity.slims_in_fit:
            check_state(trainer.optimizers, pruner.parameters)
        statistics, gradients = self._collection.statistics(trainer), self._collection.gradients()
        if not statistics and settings.resolved_criterion.needs_statistics(self.screening_weight):
            raise ValueError(f"epoch {epoch} had no training batch, so there is nothing to rank by")
        if not gradients and settings.needs_gradients:
            raise ValueError(f"epoch {epoch} had no optimizer step, so there are no gradients to rank by")
        decision = pruner.decide(statistics, gradients)
        seed = torch.initial_seed() % 2**63 + epoch
        fraction = self._budget.fraction(epoch)
        kept = decide_once(trainer, lambda: decision.new_masks(fraction, seed))
        hold = holds(settings, self._budget, epoch)
        decision.carry_out(kept, trainer.optimizers, hold)
        if hold:
            self._budget.met(epoch)
        self._collection.reset()

    # ---- slimming

    def _slim(self, trainer: Trainer) -> None:
        pruner = self._fit_pruner
        plan = pruner.slim(trainer) if self.slim and pruner.plan is None else None
        if plan is None:
            return
        self._budget.closed = True
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, TrainingHooks) and other is not self:
                other.follow(plan)

    def follow(self, plan: SlimmingPlan) -> None:
        """Go on with a network that another of these callbacks has made smaller.

        Args:
            plan: the plan of that slimming, with names as in the module.
        """
        if self._pruner is not None:
            self._pruner.follow(plan)
            self._pruner.masks.forget_removed()
            self._collection.end()  # its sums are of layers of the size before
