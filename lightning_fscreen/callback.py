"""`ScreeningPruningCallback`: its arguments, the start and the end of a fit, its state."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_fscreen.candidates.costs import Currency
from lightning_fscreen.candidates.granularity import Patterns
from lightning_fscreen.candidates.prunable import Bias, Feature
from lightning_fscreen.candidates.weights import Connections
from lightning_fscreen.costs.timings import DEFAULT, Latency
from lightning_fscreen.fit import clock
from lightning_fscreen.fit.copies import Copies, resize_held_copies
from lightning_fscreen.fit.distributed import broadcast_buffers, check_strategy, gather
from lightning_fscreen.fit.optim import order_of, restore_order
from lightning_fscreen.fit.origin import Origin
from lightning_fscreen.fit.phases import Progress
from lightning_fscreen.fit.pruner import Pruner
from lightning_fscreen.fit.results import Results
from lightning_fscreen.fit.settings import Settings
from lightning_fscreen.ranking.amounts import Amount
from lightning_fscreen.ranking.budgeted import Scope
from lightning_fscreen.ranking.criteria import resolve_criterion
from lightning_fscreen.ranking.schedule import Schedule, ScheduleName, resolve_schedule
from lightning_fscreen.slimming.optimizers import check_optimizers, unwrapped
from lightning_fscreen.slimming.state import resize_on_load
from lightning_fscreen.statistics.labels import find_labels

log = logging.getLogger(__name__)


class ScreeningPruningCallback(Results):
    """Prune a classifier while it trains, by the F-statistics of its activations and by magnitude.

    At the end of every epoch of the window the lowest-ranked candidates go, down to the budget of the schedule; they
    are exactly zero from then on (arXiv 2502.07189). A window in steps does the same every `prune_every` optimizer
    steps, within epochs or across them: trainings of one epoch, or of `max_steps` alone, have one by default. With
    granularity "channel" (CLS) or "unit" the network is made physically smaller as soon as the whole amount is pruned,
    and the rest of the fit trains the smaller network. With "weight" (WLS) hidden units and channels left without
    incoming or outgoing weights are removed when the fit ends. Either way it computes the same function afterwards.

    Moving averages of the network (`AveragedModel`, timm's `ModelEmaV3`, Lightning's `WeightAveraging`, a mean teacher)
    become smaller with it; a copy that stands still, a fixed teacher, stays.

    Args:
        granularity: "channel": channels of batch norms; "unit": these, and the outputs of all other linear and
            convolution layers (hidden units, channels without batch norms); "weight": connections of such layers.
        amount: fraction pruned in the end, 0 ≤ amount < 1, of what `budget` counts; met exactly (±1 candidate). Or one
            for every pattern, {"layer1.*": 0.3, "*": 0.6}: the first that matches a layer's name counts, its layers are
            ranked by themselves, and layers that none matches are not pruned.
        screening_weight: λ of the screening criteria: 0 ranks by magnitude alone, 1 by the F-statistic alone.
        schedule: "logistic", "one_shot", "linear", "cubic", "iterative" (five rounds), "constant", or a callable:
            progress ∈ [0, 1] → fraction of the amount.
        start_epoch: first epoch of the annealing window. What is frozen at first (`BackboneFinetuning`) is pruned, too,
            if it is trained by then.
        end_epoch: first epoch after it, when the whole amount is pruned and fine-tuning begins; None for half of the
            training; 0 to prune at initialisation, by the first training step alone.
        start_step: optimizer steps before the window, instead of epochs, counted as `max_steps` counts them: one for
            several accumulated batches, and those of all optimizers where the module steps by itself.
        end_step: optimizer steps after which the whole amount is pruned and fine-tuning begins; None for half of the
            training.
        prune_every: optimizer steps between two prunings, and those before each in which statistics are gathered; None
            for a tenth of the window. Any of these three makes it a window in steps.
        scope: "global" ranks all layers together; "layer" prunes the same fraction of every layer: safer where much
            goes at once, because it leaves no layer with next to nothing; "kind", of batch norms and of other layers.
        criterion: ranking metric: "screening", "screening_sum" (the paper's), "screening_product", "screening_rank",
            "magnitude", "connected_magnitude", "activation", "gradient", "taylor", "random", or your own
            (`register_criterion`).
        min_channels: candidates that every layer keeps at least; the others still meet the budget.
        include: glob patterns over module names, one of which a layer must match. Without it, weight pruning leaves
            alone what is all zero at the start among others: the new head of a fine-tuning.
        exclude: glob patterns over module names, none of which a layer may match.
        num_classes: number of classes; None to find it in the datamodule, the module or its last linear layer.
        labels: callable batch → class indices (N,) or weights (N, C); by default found in (x, y), dicts, ….
        slim: make the network physically smaller.
        collect_every: gather statistics in every so many-th training batch; "auto" for evenly spaced ones, as many as
            the tests need for this number of classes (3,200 instances for 10 classes): see `sampling`.
        collect_epochs: epochs before each pruning over which statistics are gathered.
        connections: "factored" keeps F per input of a layer, C × inputs numbers; "exact" per connection, C × weights,
            which differs by the weights' movement within an epoch. For weights only.
        bias: output of pruned channels and units until training makes up for them: "zero" (γ = β = 0; weights and bias
            0); "fold", their shift or bias, carried into the layers that read them; "mean", their mean activation,
            likewise, if the layer has a shift or bias to take it. Not for weights.
        feature: what is screened, averaged over the positions (of tokens, those that an entry `attention_mask` of the
            batch keeps): "activation", the unit behind the activation function after its layer; "activation_square",
            its square; "output" and "output_square", of the layer's own output. Not for weights.
        rewind_lr: start the learning-rate schedules again when fine-tuning begins.
        rewind_weights: put what remains, and the learning rates, back to where the fit began (lottery ticket).
        budget: what the amount is a fraction of: "candidates"; "params", "macs" or "latency", the parameters,
            multiply–adds or latency of the dense network, counted as slimming will leave it and met to the nearest
            unit. A unit then goes for a low score divided by what it costs: see `ranking.per_cost.prune_to_cost`. A
            latency is the sum of those of all operations, each measured by itself, layers at several widths; the first
            pruning and the last try how much of that has to go, by networks as small as they will be, for the whole to
            take the time that was asked for. `report().latency` has that of the whole, before and after. Not for
            weights.
        round_to: leave every width of a linear or convolution layer as it is, or a multiple of this (8, for hardware
            that likes it): units go in groups of so many, up or down as the group at the margin is worth, and the
            budget is met as nearly as that allows. Of grouped convolutions these are all outputs and the inputs of one
            group; of attention the channels of all heads, which go as a whole. Layers with too few units stay. Where
            several batch norms select from a stream, channels that none of them reads may stay to make its width a
            multiple. `report().not_rounded` has what is no multiple, and why. Not for weights.
        streams: under a budget of costs, also prune a channel of a residual stream, or of a DenseNet's, as one with all
            that read it, where batch norms select from it, if that is worth less for its cost than they are one by one.
            On ResNet-20 that was no better. Not for weights.
        latency: for budget="latency": `Latency(batch_size=1, device=None, table=None)`, how many instances at once, on
            which device ("cpu" while the network trains on a GPU; None: where it trains), and a file for the times that
            were measured, to be measured once only. With `round_to=8` more of the network stays at the same latency
            (ResNet-20 on a CPU, one image, 70 % left: 49 % of the multiply–adds, without it 28 %).
        soft: until the window ends, zero the lowest-ranked candidates after an epoch (of units, γ or the weights) but
            let them grow again (soft filter pruning, arXiv 1808.06866).

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
        amount: Amount = 0.6,
        screening_weight: float = 0.25,
        schedule: ScheduleName | Schedule = "logistic",
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
        start_step: int | None = None,
        end_step: int | None = None,
        prune_every: int | None = None,
        budget: Currency = "candidates",
        round_to: int = 1,
        streams: bool = False,
        latency: Latency = DEFAULT,
    ) -> None:
        if bias not in get_args(Bias):
            raise ValueError(
                f'unknown bias {bias!r}; choose one of {list(get_args(Bias))} ("ridge" is for prune(), which no '
                "training need follow)"
            )
        if resolve_criterion(criterion).needs_errors:
            raise ValueError(
                f"criterion={criterion!r} is for prune(), which looks at all activations of a trained network; "
                'here use another one, such as "screening"'
            )
        settings = Settings(
            granularity=granularity,
            amount=dict(amount) if isinstance(amount, Mapping) else amount,
            screening_weight=screening_weight,
            schedule=resolve_schedule(schedule),
            start_epoch=start_epoch,
            end_epoch=end_epoch,
            start_step=start_step,
            end_step=end_step,
            prune_every=prune_every,
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
            budget=budget,
            round_to=round_to,
            streams=streams,
            latency=latency,
            rewind_lr=rewind_lr,
            rewind_weights=rewind_weights,
            soft=soft,
        )
        super().__init__(settings)

    # ---- start of a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the strategy, and the window against the length of the training.

        From here on the model takes the size of the checkpoint that is loaded into it.

        Raises:
            NotImplementedError: an unsupported strategy, communication hook or callback.
            ValueError: a window that ends after the training, or none given for a training without an end.
        """
        if stage == "fit":
            check_strategy(trainer, self.settings.slims_in_fit)
            self._budget.window = clock.find_window(self.settings, trainer, loaded=False) or self._budget.window
        self._loading.close()
        self._loading.callback(resize_held_copies(trainer, pl_module).remove)
        self._loading.callback(resize_on_load(pl_module))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the candidates.

        Raises:
            ValueError: nothing to prune, patterns that match nothing.
            NotImplementedError: an unsupported optimizer.
        """
        check_optimizers(unwrapped(trainer.optimizers))
        state = self._restored or self._present_state(pl_module)
        self._restored, self._waits = {}, False
        self._remove_hooks()
        self._progress = Progress.restored(state)
        known = state.get("pruner", {})
        copies = Copies(trainer, pl_module, known.get("copies", {}))
        self._pruner = pruner = Pruner(pl_module, self.settings, known, Origin(trainer), copies)
        self._budget.target = state.get("target", pruner.pruned)
        self._budget.closed = pruner.plan is not None
        self._set_total()
        if "optimizers" in state:
            restore_order(trainer.optimizers, pl_module, state["optimizers"])
        pruner.watch(unwrapped(trainer.optimizers))
        # Resumed within an epoch, or between its last batch and its end.
        granularity = pruner.granularity
        self._collection.load_state(
            trainer, state.get("collections", []), state.get("stride"), pruner.found.collectors, granularity.gradients
        )
        if self.rewind_weights and not self.fine_tuning:
            pruner.origin.remember_weights(pl_module, state.get("origin"))
        if self._budget.falls_short:
            log.warning(
                "the network was made smaller in an earlier fit, so no more is pruned in this one; to prune more, "
                "train with a new ScreeningPruningCallback"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the window, now that the number of batches is known.

        Raises:
            ValueError: a window that ends after the training, or none given for a training of unknown length.
        """
        window = clock.find_window(self.settings, trainer, loaded=True)
        assert window is not None
        if window.unit != self._progress.unit:
            self._progress.unit, self._progress.round_end = window.unit, None  # new, or resumed under other settings
        self._budget.window = window
        if self._budget.asks_for_more(window.end) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            clock.warn_without_fine_tuning(window, clock.find_length(trainer, loaded=True))

    def _present_state(self, pl_module: LightningModule) -> dict[str, Any]:
        """The state that another fit of the same model goes on from; empty for a new one."""
        state = self._pruner.present_state(pl_module) if self._pruner is not None else {}
        return {"pruner": state, "target": self._budget.target} if state else {}

    # ---- end of a fit

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let all processes end with the same buffers, as their next forward pass would, before they slim."""
        broadcast_buffers(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Physically remove dead units and channels (not in on_train_end, where checkpoints are still being saved)."""
        window = self._budget.window
        self._fit_pruner.follow_device()
        if self._round_is_over(trainer):
            self._end_round(trainer)  # resumed when nothing but this was left to do
        self._remove_hooks()
        if trainer.num_training_batches == 0 and not self.history:
            raise ValueError("the training dataloader is empty, so nothing was trained or pruned; check the data set")
        pruner = self._fit_pruner
        pruner.reattach()
        pruner.masks.apply()  # averages may have been put into the place of the weights
        if self._budget.asks_for_more(window.end) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            clock.warn_before_the_end(
                window, clock.position(trainer, window), pruner.pruned_fraction, self.total_amount
            )
        if reason := pruner.why_not_removable():
            pruner.not_removed = reason
            if self.slim:
                log.warning("nothing was physically removed: %s", reason)
            return
        if not pruner.granularity.slims_in_fit or pruner.pruned:  # the latter without an epoch of fine-tuning
            self._slim(trainer)
            self._remove_hooks()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind, also after an error."""
        self._remove_hooks()
        self._loading.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind after an error."""
        self.teardown(trainer, pl_module, "fit")

    # ---- state

    @functools.cached_property  # Lightning asks for it around every hook
    def state_key(self) -> str:
        """Tells several of these callbacks apart in a checkpoint."""
        return self._generate_state_key(granularity=self.granularity, include=self.include, exclude=self.exclude)

    def state_dict(self) -> dict[str, Any]:
        """Masks, plan and history, as tensors and primitives (for `weights_only` loading)."""
        pruner, stride = self._pruner, self._collection.found_stride
        state: dict[str, Any] = {"history": [dict(entry) for entry in self.history], **self._progress.state_dict()}
        state |= {"target": self._budget.target, "stride": stride}
        if pruner is not None:
            state |= {"origin": pruner.origin.weights} if pruner.origin.weights else {}
            state |= {"pruner": pruner.state_dict()}
        return state

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the sums of the running epoch in every process, and the order of the parameters."""
        own = checkpoint.get("callbacks", {}).get(self.state_key)
        if own is not None:
            own["collections"] = gather(trainer, self._collection.state_dict())
            own["optimizers"] = order_of(trainer.optimizers, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave, when the next fit starts."""
        self._restored = dict(state_dict)
        self.history = [dict(entry) for entry in state_dict["history"]]
