"""The pruner of one model in a fit: its candidates, masks and slimming, and their state for checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_fscreen.candidates.granularity import Granularity
from lightning_fscreen.costs.size import add_sizes
from lightning_fscreen.fit.compiled import Eagerly
from lightning_fscreen.fit.connectivity import Connectivity
from lightning_fscreen.fit.copies import Copies
from lightning_fscreen.fit.decision import Decision
from lightning_fscreen.fit.discovery import Discovery
from lightning_fscreen.fit.distributed import broadcast_buffers
from lightning_fscreen.fit.masks import Masks
from lightning_fscreen.fit.networks import Network
from lightning_fscreen.fit.origin import Origin
from lightning_fscreen.fit.recorder import Recorder
from lightning_fscreen.fit.rehearsal import compare, copied, find_asked, latency_without
from lightning_fscreen.fit.report import PruningReport, Record
from lightning_fscreen.fit.settings import Settings
from lightning_fscreen.fit.spending import Spending
from lightning_fscreen.fit.surgery import slim_in_fit, slim_networks
from lightning_fscreen.slimming import CaptureError, SlimmingPlan, VerificationError
from lightning_fscreen.slimming.resize import reattach
from lightning_fscreen.slimming.state import carry
from lightning_fscreen.statistics.gradients import GradientStatistics
from lightning_fscreen.statistics.probes import FeatureStatistics

log = logging.getLogger(__name__)


class Pruner:
    """The candidates of one model, their masks, and the channels and units that were physically removed.

    Args:
        model: the module that is trained, full-size or as small as `state` says.
        settings: the callback's arguments.
        state: a `state_dict` to go on from; empty to begin.
        origin: where the fit began.
        copies: copies of the network, which follow it.

    Attributes:
        found: the candidates, and the networks that hold them.
        spending: what the budget counts.
        masks: their masks.
        eagerly: lets a compiled network run eagerly while hooks are active.
        origin: where the fit began.
        plan: the plan of this pruner's own slimming; None before.
        not_removed, not_rounded: as of `PruningReport`.

    Raises:
        ValueError: nothing to prune, patterns that match nothing.
    """

    def __init__(
        self, model: LightningModule, settings: Settings, state: Mapping[str, Any], origin: Origin, copies: Copies
    ) -> None:
        self._model, self._settings, self._state = model, settings, state
        self.origin, self.copies = origin, copies
        self.eagerly = Eagerly(model)
        self.plan = SlimmingPlan.from_json(state["plan"]) if state.get("plan") else None
        # All slimmings, those of other callbacks included.
        self._applied_plan = SlimmingPlan.from_json(state["since"]) if state.get("since") else SlimmingPlan()
        self.not_removed: str | None = state.get("not_removed")
        self.not_rounded: dict[str, str] = dict(state.get("not_rounded", {}))
        reattach(model, self._applied_plan)
        self._optimizers: list[Optimizer] = []
        self.found = Discovery(model, settings, state, copies)
        self._connectivity = Connectivity(model, self.found)
        self._record = Record(state.get("sizes"), state.get("evidence", {}))
        self._timings = settings.timings(model.device, state.get("timings"))
        self.spending = Spending(settings, self.found, self._record, self._timings, state.get("asked"))
        self.masks = self._restored_masks()
        self.measure()

    @property
    def granularity(self) -> Granularity[Any]:
        """The candidates."""
        return self.found.granularity

    @property
    def recorder(self) -> Recorder:
        """The networks and their inputs."""
        return self.found.recorder

    def learn(self, network: Network) -> bool:
        """Learn from a network that has just been found and is about to run.

        Returns:
            Whether the candidates may have changed by that.

        Raises:
            CaptureError: it cannot be captured, and holds no other module that may be a network.
            ValueError: nothing to prune.
        """
        before = self.granularity.names
        if not self.found.learn(network):
            return False
        self.measure()
        if self.granularity.names != before:
            self._replace_masks(self._restored_masks())
        return self.granularity.slims_in_fit

    def settle(self) -> bool:
        """Look for no more networks; returns whether that changed the candidates."""
        if not self.found.settle(list(self.masks.kept)):
            return False
        self._replace_masks(self._make_masks())
        return True

    def _restored_masks(self) -> Masks:
        """Those of the state, if it has masks of the same candidates; else fresh ones."""
        restored, names = self._state.get("kept", {}), self.granularity.names
        if restored.keys() == set(names):
            return self._make_masks(restored, self._state.get("held", True))
        if restored and self.recorder.is_ready:
            raise ValueError(
                f"the checkpoint has masks for {sorted(restored)}, but the candidates of "
                f"{type(self._model).__name__} are {sorted(names)}; resume with the same model and the same "
                f"granularity, include and exclude{self._why_missing(restored)}"
            )
        return self._make_masks()

    def _why_missing(self, names: Collection[str]) -> str:
        reasons = self.granularity.not_pruned
        found = [f"{name}: {reasons[name]}" for name in sorted(names) if name in reasons]
        return f" ({', '.join(found)})" if found else ""

    def _make_masks(self, kept: Mapping[str, Tensor] | None = None, held: bool = True) -> Masks:
        members, parameters = self.granularity.members(), self.parameters
        self.copies.candidates = list(members)
        names = {layer: parameters[own.weight] for layer, own in members.items()}
        return Masks(members, kept, held, self._applied_plan, names)

    def _replace_masks(self, masks: Masks) -> None:
        """Enforce other masks from now on, or the same over other parameters, in the optimizers that are watched."""
        self.masks.unwatch()
        self.masks = masks
        masks.watch(self._optimizers)

    # ---- masks

    @property
    def parameters(self) -> dict[Tensor, str]:
        """Names of the model's parameters."""
        return {parameter: name for name, parameter in self._model.named_parameters()}

    @property
    def pruned(self) -> int:
        """How much is pruned of what the budget counts."""
        return self.spending.pruned(self.masks)

    @property
    def pruned_fraction(self) -> float:
        """Fraction of it that is pruned."""
        return self.pruned / self.spending.total(self.masks)

    def watch(self, optimizers: Sequence[Optimizer]) -> None:
        """Keep pruned values at zero, from now on and in the state of these optimizers."""
        self._optimizers = self.recorder.optimizers = list(optimizers)
        self.masks.watch(optimizers)

    def unwatch(self) -> None:
        """Remove all hooks."""
        self.eagerly.stop()
        self.recorder.stop()
        self.masks.unwatch()
        self._optimizers = []

    def follow_device(self) -> None:
        """Go on where the model is now: Lightning moves it to the CPU when a fit ends."""
        self._replace_masks(self._make_masks(self.masks.kept, self.masks.held))

    def measure(self) -> None:
        """Measure the networks on the inputs that they got."""
        networks = self.recorder.networks.values() or [self.recorder.parent_network]
        size = add_sizes([network.measure(self._model, self._timings) for network in networks])
        self._record.note_size(size, pruned=bool(self.masks.num_pruned or self._applied_plan))

    def why_not_removable(self) -> str | None:
        """Measure the networks when the fit has ended; why they cannot be looked at, if they cannot."""
        where = self.recorder.describe()
        if not self.recorder.is_ready:
            return (
                f"{where} was not called in training, nor a module inside it that holds pruned layers, so its inputs "
                "are not known; call the module that holds them as a whole, self.net(x)"
            )
        try:
            self.measure()
        except Exception as error:  # whatever forward raises: the training is done, and must not be lost
            return (
                f"forward of {where} fails on the CPU, where Lightning moves a model when its fit ends: "
                f"{type(error).__name__}: {error}"
            )
        return None

    def reattach(self) -> None:
        """Attach the plan again where a strategy has replaced batch norms."""
        reattach(self._model, self._applied_plan)

    # ---- pruning

    def leave_out_unseen(self, found: Mapping[str, Any], reason: str) -> bool:
        """Leave layers alone of which nothing was seen in the epoch; returns whether there were any.

        Args:
            found: what was seen, by layer.
            reason: why nothing may have been seen of the others.

        Raises:
            ValueError: such a layer is named by `include`, or some of its candidates are pruned already.
        """
        unseen = [name for name in self.granularity.names if name not in found]
        if not unseen:
            return False
        pruned = [name for name in unseen if not bool(self.masks.kept[name].all())]
        if self._settings.include is not None or pruned:
            raise ValueError(
                f"layers {pruned or unseen} cannot be ranked: {reason}; leave them out with exclude={pruned or unseen}"
            )
        self.found.leave_out(unseen, reason)
        left = {name: mask for name, mask in self.masks.kept.items() if name not in unseen}
        self._replace_masks(self._make_masks(left, self.masks.held))
        return True

    def decide(
        self,
        statistics: Mapping[str, FeatureStatistics],
        gradients: Mapping[str, GradientStatistics],
        unmatched: Mapping[str, str],
    ) -> Decision:
        """Rank the candidates, and note for the report why they are ranked so; see `Decision`."""
        decision = Decision(
            self._settings,
            self.granularity,
            self.masks,
            self.spending,
            statistics,
            gradients,
            unmatched,
            find_idle=self._connectivity.idle,
            last=self._record.evidence,
        )
        self._record.note(decision.explained)
        return decision

    def is_to_ask(self, fraction: float) -> bool:
        """Whether it is to be measured what to ask for: at the first pruning, and again at the last one."""
        amount = self.spending.amount(self.masks)
        return self._timings is not None and amount > 0 and (self.spending.asked is None or fraction >= amount)

    def find_asked(self, decision: Decision, seed: int) -> Mapping[str, Tensor]:
        """What to ask of the sum of all operations, as "asked"; see `find_asked`."""
        networks, timings, amount = self.recorder.networks.values(), self._timings, self.spending.amount(self.masks)
        assert timings is not None, "a latency is measured"

        def measure() -> float:
            kept = decision.new_masks(amount, seed)
            return latency_without(self._model, networks, self.granularity, kept, timings)

        return {"asked": torch.tensor(find_asked(self.spending, self.masks, measure), dtype=torch.float64)}

    def rewind_weights(self, optimizers: Sequence[Optimizer]) -> None:
        """Put the remaining weights back to where the fit began; optimizers begin afresh."""
        self.origin.rewind_weights(self._model, self._applied_plan, optimizers)
        self.masks.apply()
        self.copies.begin_again()

    # ---- slimming

    def lead_copies(self) -> None:
        """Let the copies of the network be pruned where it is."""
        self.copies.refresh()
        names, present = self.parameters, self.masks.present
        members = self.granularity.members().items()
        pruned = [both for layer, own in members for both in own.affected(~present[layer])]
        self.copies.take_pruned("", {names[parameter]: mask for parameter, mask in pruned})

    def slim(self, trainer: Trainer) -> SlimmingPlan | None:
        """Make the networks smaller, and their copies; returns the plan, or None if it cannot be done exactly."""
        self.lead_copies()
        for module in self.copies.outside:
            broadcast_buffers(trainer, module)
        networks = list(self.recorder.networks.values())
        dense = [] if self._timings is None else [copied(network.module) for network in networks]
        try:
            slim = partial(self._slim_networks, trainer)
            not_rounded = self.granularity.not_rounded(self.masks.present)
            plan = slim_in_fit(trainer, self._model, slim, is_over=not self.granularity.slims_in_fit)
        except (CaptureError, VerificationError) as error:  # a model in training must survive this
            self.not_removed = str(error)
            log.warning("nothing was physically removed, the masks stay: %s", error)
            return None
        self.plan, self.found.fixed, self.not_rounded = plan, True, not_rounded
        self.not_removed = "\n".join(filter(None, (self.not_removed, self.granularity.still_there(plan)))) or None
        for module in (self._model, *self.copies.outside):
            carry(module)
        self.copies.average_exactly()
        self.follow(plan)
        if self._timings is not None:
            self._record.note_latency(*compare(self._model, networks, dense, self._timings))
        self.eagerly.recompile()
        log.info("slimmed: %s → %s parameters", self._record.before.params, self._record.after.params)
        return plan

    def _slim_networks(self, trainer: Trainer) -> SlimmingPlan:
        networks = self.recorder.networks.values()
        plan, self.not_removed = slim_networks(
            trainer, self._model, self.granularity, networks, self.masks.present, self.copies
        )
        return plan

    def follow(self, plan: SlimmingPlan) -> None:
        """Go on with a model that this pruner or another one has made smaller."""
        self._applied_plan = self._applied_plan.then(plan)
        self.found.find_again(self.masks.kept)
        self._connectivity = Connectivity(self._model, self.found)
        self._replace_masks(self._make_masks(self.masks.kept, self.masks.held))
        self.measure()

    # ---- results and state

    def report(self) -> PruningReport:
        """The candidates and sizes before and now."""
        removed = dict(self.plan.removed) if self.plan is not None else {}
        for layer in self.copies.reasons(list(removed)):
            del removed[layer]
        return self._record.report(
            self.masks,
            granularity=self._settings.granularity,
            removed=removed,
            not_pruned=dict(self.granularity.not_pruned),
            not_removed=self.not_removed,
            not_rounded=self.not_rounded,
            latency=self.spending.latency(self.masks),
        )

    def present_state(self, model: LightningModule) -> dict[str, Any]:
        """As `state_dict`, for another fit; empty for another model, or if another size was loaded into this one."""
        if not set(self.granularity.modules).issubset(model.modules()):
            return {}
        parameters, masks = dict(model.named_parameters()), self.masks
        if masks.fit(masks.present, parameters):
            return self.state_dict()
        dense = masks.fit(masks.kept, parameters)  # was loaded
        return self.state_dict() | {"plan": "", "since": ""} if dense else {}

    def state_dict(self) -> dict[str, Any]:
        """Masks, plan and inputs, as tensors and primitives."""
        return {
            "kept": dict(self.masks.kept),
            "held": self.masks.held,
            "plan": "" if self.plan is None else self.plan.to_json(),
            "since": self._applied_plan.to_json(),
            "sizes": list(astuple(self._record.before)),
            "not_removed": self.not_removed,
            "not_rounded": dict(self.not_rounded),
            **self.found.state_dict(),
            "evidence": {name: dict(found) for name, found in self._record.evidence.items()},
            "copies": dict(self.copies.samples),
            "timings": {} if self._timings is None else self._timings.state_dict(),
            "asked": self.spending.asked,
        }
