"""The Trainer's hooks for rounds (epochs, or so many steps) and training steps. The decisions are those of `phases`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer

from lightning_fscreen.fit.clock import position
from lightning_fscreen.fit.distributed import decide_once
from lightning_fscreen.fit.gathering import Collection
from lightning_fscreen.fit.networks import Network
from lightning_fscreen.fit.phases import IDLE, Progress, gathers, holds, next_phase, plan_step, searches
from lightning_fscreen.fit.pruner import Pruner
from lightning_fscreen.fit.report import metrics_of
from lightning_fscreen.fit.settings import HasSettings, Settings
from lightning_fscreen.fit.surgery import forget_scores
from lightning_fscreen.modules import names_of_frozen
from lightning_fscreen.ranking.budget import Budget
from lightning_fscreen.ranking.window import Window
from lightning_fscreen.slimming import SlimmingPlan
from lightning_fscreen.slimming.optimizers import check_state, unwrapped

log = logging.getLogger(__name__)

_NOT_CALLED = (
    "it was not called in the epoch whose activations rank the candidates: forward uses its weight without calling it "
    "(F.linear(x, layer.weight), attention), or does not use it at all"
)
_NO_GRADIENT = "it had no gradient in the epoch whose gradients rank the candidates: the loss does not depend on it"


class TrainingHooks(HasSettings, Callback):
    """The part of `ScreeningPruningCallback` that acts in rounds and training steps.

    Args:
        settings: the callback's arguments.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.history: list[dict[str, float]] = []
        """Per round ended: epoch, optimizer steps completed, scheduled and applied pruned fraction (of the budget)."""
        start = self.start_step or self.start_epoch
        amount = max(self.amount.values()) if isinstance(self.amount, Mapping) else self.amount
        self._budget = Budget(amount, self.schedule, Window(start, start + 1))  # until the training is known
        self._collection = Collection(self.settings)
        self._progress = Progress()
        self._pruner: Pruner | None = None
        self._waits = False  # until more is trained than now, which is too little to prune
        self._restored: dict[str, Any] = {}  # the state that the next fit goes on from
        self._loading = ExitStack()  # its end is that of listening to what is loaded

    def _set_total(self, step_ended: bool = False) -> None:
        """Tell the budget its total; if the candidates are final, check that the floors leave enough to prune.

        Args:
            step_ended: whether a step has called all networks, as far as can be seen; else others may be called yet.
        """
        pruner = self._fit_pruner
        self._budget.amount = pruner.spending.amount(pruner.masks)
        self._budget.total = pruner.spending.total(pruner.masks)
        if (pruner.found.is_final or (step_ended and pruner.found.is_ready)) and pruner.plan is None:
            pruner.spending.check(pruner.masks)

    def _find_again(self, trainer: Trainer, model: LightningModule) -> None:
        """Look anew for what can be pruned where other layers are frozen than before, until pruning begins."""
        pruner = self._fit_pruner
        same = pruner.found.frozen == names_of_frozen(model) and not (self._waits and self._is_time)
        if same or pruner.recorder.closed or pruner.masks.num_pruned:
            return
        self._waits = False
        self._begin_again(trainer, model)

    def _begin_again(self, trainer: Trainer, model: LightningModule) -> None:
        pruner = self._fit_pruner
        self._remove_hooks()
        self._pruner = Pruner(model, self.settings, {"fresh": pruner.found.fresh}, pruner.origin, pruner.copies)
        self._pruner.watch(unwrapped(trainer.optimizers))
        self._set_total()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Inside, it is no error yet that too little can be pruned, if what is frozen may be trained in time."""
        try:
            yield
        except ValueError as error:
            shortened = self._budget.window.start < (self.start_step or self.start_epoch)  # by fast_dev_run
            if not self._fit_pruner.found.frozen or (self._is_time and not shortened):
                raise
            log.warning("%s\nSome parameters are frozen; they are looked at again when pruning begins.", error)
            self._waits = True

    @property
    def _is_time(self) -> bool:
        """Whether the running round ends with pruning, or statistics are gathered in it."""
        round_end = self._progress.round_end
        assert round_end is not None
        return gathers(self.settings, self._budget, round_end) or self._budget.asks_for_more(round_end)

    @property
    def _fit_pruner(self) -> Pruner:
        assert self._pruner is not None, "no fit has started"
        return self._pruner

    # ---- the training step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a round, unless one of several epochs is running."""
        self._fit_pruner.copies.refresh()  # other callbacks have made theirs by now
        self._begin_round(trainer)

    def _begin_round(self, trainer: Trainer) -> None:
        """Start the sums afresh; when the whole amount is pruned, begin to fine-tune the smaller network."""
        # Not when the last round ends: checkpoints and scores of the larger network are still to come. Resumed from a
        # checkpoint between the last batch of an epoch and its end, Lightning begins with the next epoch's first batch.
        progress, now = self._progress, position(trainer, self._budget.window)
        if self._round_is_over(trainer):
            self._end_round(trainer)
        if progress.round_end is not None:
            return
        progress.round_end, progress.batches = self._budget.window.round_end(now), 0
        if not gathers(self.settings, self._budget, progress.round_end):
            self._collection.end()
        # Resumed with inputs that no checkpoint can hold, the pruner is ready after one more batch.
        phase = next_phase(progress.phase, self._budget, now, self._fit_pruner.found.is_ready)
        if phase is not progress.phase:
            progress.phase = phase
            self._begin_fine_tuning(trainer)

    def _round_is_over(self, trainer: Trainer) -> bool:
        progress, window = self._progress, self._budget.window
        if progress.round_end is None or progress.unit != window.unit:
            return False
        return progress.round_end <= position(trainer, window)

    def _begin_fine_tuning(self, trainer: Trainer) -> None:
        pruner = self._fit_pruner
        if self.rewind_weights:
            pruner.rewind_weights(unwrapped(trainer.optimizers))
        if pruner.granularity.slims_in_fit:
            self._slim(trainer)
        forget_scores(trainer)
        if self.rewind_lr or self.rewind_weights:
            pruner.origin.rewind_rates(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open the hooks for the forward pass, in rounds that end with pruning."""
        self._begin_round(trainer)
        pruner, collection, progress = self._fit_pruner, self._collection, self._progress
        window, round_end = self._budget.window, progress.round_end
        assert round_end is not None
        if not progress.batches:
            self._find_again(trainer, pl_module)
            pruner = self._fit_pruner
        index = batch_idx if window.unit == "epoch" else progress.batches
        progress.batches += 1
        recorder = pruner.recorder
        known = self._waits or recorder.is_complete
        known = known or (recorder.is_ready and not searches(self._budget, round_end, not self.history))
        step = plan_step(self.settings, self._budget, round_end, index, known, collection.stride)
        if step.gather and not collection.is_prepared:
            collection.prepare(trainer, pl_module, batch, batch_idx, window)
            step = plan_step(self.settings, self._budget, round_end, index, known, collection.stride)
        self._progress.step = step
        if step.observes:
            pruner.eagerly.start()
        if step.record:
            pruner.recorder.start(self._on_network_call)
        if step.gather:
            collection.begin(batch, batch_idx)
            if pruner.found.is_ready:
                collection.open(pruner.found.collectors)

    def _on_network_call(self, network: Network) -> None:
        """A network is about to run for the first time: learn from its inputs, and gather its activations."""
        pruner = self._fit_pruner
        with self._waiting():
            if not pruner.learn(network):
                return
            self._set_total()
            if self._progress.step.gather:
                self._collection.open(pruner.found.collectors)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remove the forward hooks: the backward pass may run layers again (activation checkpointing)."""
        if self._progress.step.observes:
            self._close()
            self._fit_pruner.recorder.stop()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for networks again: modules that step by themselves may call others before their next backward pass."""
        if self._progress.step.record:
            self._fit_pruner.recorder.start(self._on_network_call)
            self._fit_pruner.eagerly.start()

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
            self._collection.add_gradients(trainer, self._pruner.granularity.gradients, optimizer)
        if step.prunes_now:
            self._close()
            self._add(trainer)
            self._prune(trainer)
            self._pruner.masks.mask_gradients()
            self._progress.step = IDLE

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch's activations to the sums; end a round in steps.

        Raises:
            ValueError: no labels in the batch, labels out of range or of the wrong form; names the batch. As for
                `on_train_epoch_end`.
        """
        if self._progress.step.observes:
            self._close()
            with self._waiting():
                self._add(trainer, skipped=pl_module.automatic_optimization and not outputs)
            if self._waits:
                self._begin_again(trainer, pl_module)
        if self._progress.step.record and self._progress.batches == 1 and pl_module.automatic_optimization:
            self._set_total(step_ended=True)  # modules that step by themselves may call networks in turns
        if self._progress.unit == "step" and self._round_is_over(trainer):
            self._end_round(trainer)
            self._log(pl_module)

    def _add(self, trainer: Trainer, skipped: bool = False) -> None:
        pruner = self._fit_pruner
        pruner.recorder.stop()
        if not self._waits and not skipped:  # by a training_step that returned None
            pruner.found.require_networks()
        if self._progress.step.gather:
            self._collection.add(trainer)

    # ---- the end of a round

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune to the schedule's budget for this epoch, and log the remaining size.

        Raises:
            ValueError: NaN or inf activations (names the layer and the batch), a layer that never ran although
                `include` names it, a budget that the floors make impossible; nothing is pruned then.
        """
        if self._progress.unit == "epoch":
            self._end_round(trainer)
        self._log(pl_module)

    def _log(self, pl_module: LightningModule) -> None:
        pl_module.log("fscreen/sparsity", self._fit_pruner.pruned_fraction, prog_bar=True)
        pl_module.log_dict(metrics_of(self._fit_pruner.report(), type(self._fit_pruner.granularity)))

    def _end_round(self, trainer: Trainer) -> None:
        pruner, round_end = self._fit_pruner, self._progress.round_end
        assert round_end is not None
        pruner.masks.apply()  # somebody may have changed gradients after us
        if self._budget.asks_for_more(round_end) and not self._waits:
            self._prune(trainer)
        self._progress.round_end = None
        epoch = round_end - 1 if self._budget.window.unit == "epoch" else trainer.current_epoch
        entry = {"epoch": epoch, "step": trainer.global_step, "scheduled": self._budget.fraction(round_end)}
        self.history.append(entry | {"applied": pruner.pruned_fraction})

    def _prune(self, trainer: Trainer) -> None:
        pruner, settings, round_end = self._fit_pruner, self.settings, self._progress.round_end
        assert round_end is not None
        if pruner.settle():
            self._set_total()
        if self.slim and pruner.granularity.slims_in_fit:
            check_state(unwrapped(trainer.optimizers), pruner.parameters)
        statistics, gradients = self._collection.statistics(trainer), self._collection.gradients()
        unmatched = {name: why for name, why in self._collection.unmatched.items() if name not in statistics}
        ended = self._budget.window.name(round_end)
        if not statistics and not unmatched and settings.resolved_criterion.needs_statistics(self.screening_weight):
            raise ValueError(f"{ended} had no training batch, so there is nothing to rank by")
        if not gradients and settings.needs_gradients:
            raise ValueError(f"{ended} had no optimizer step, so there are no gradients to rank by")
        seen = ({**statistics, **unmatched}, _NOT_CALLED), (gradients, _NO_GRADIENT)
        if any([pruner.leave_out_unseen(found, reason) for found, reason in seen if found]):
            self._set_total()
        decision = pruner.decide(statistics, gradients, unmatched)
        seed = torch.initial_seed() % 2**63 + round_end - 1
        fraction = self._budget.fraction(round_end)
        if self.slim and pruner.is_to_ask(fraction):
            found = decide_once(trainer, lambda: pruner.find_asked(decision, seed))
            pruner.spending.asked = found["asked"].item()
        kept = decide_once(trainer, lambda: decision.new_masks(fraction, seed))
        hold = holds(settings, self._budget, round_end)
        decision.carry_out(kept, unwrapped(trainer.optimizers), hold)
        if hold:
            pruner.lead_copies()
            self._budget.met(round_end)
        self._collection.reset()

    def _remove_hooks(self) -> None:
        self._collection.end()
        if self._pruner is not None:
            self._pruner.unwatch()

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
