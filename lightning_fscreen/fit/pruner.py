"""The pruner of one model in a fit: its candidates, masks and slimming, and their state for checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fscreen.candidates.granularity import Granularity
from lightning_fscreen.costs.size import measure_size
from lightning_fscreen.fit.compiled import Eagerly
from lightning_fscreen.fit.decision import Decision
from lightning_fscreen.fit.masks import Masks
from lightning_fscreen.fit.origin import Origin
from lightning_fscreen.fit.recorder import InputRecorder, networks_around
from lightning_fscreen.fit.report import PruningReport, Record
from lightning_fscreen.fit.settings import Settings
from lightning_fscreen.fit.surgery import slim_in_fit
from lightning_fscreen.saving.checkpoints import carry_plan
from lightning_fscreen.slimming import CaptureError, SlimmingPlan, VerificationError
from lightning_fscreen.slimming.resize import reattach
from lightning_fscreen.statistics.collector import FeatureStatistics
from lightning_fscreen.statistics.gradients import GradientStatistics

log = logging.getLogger(__name__)


class Pruner:
    """The candidates of one model, their masks, and the channels and units that were physically removed.

    Args:
        model: the module that is trained, full-size or as small as `state` says.
        settings: the callback's arguments.
        state: a `state_dict` to go on from; empty to begin.
        origin: where the fit began.

    Attributes:
        granularity: the candidates.
        masks: their masks.
        recorder: the network and its inputs.
        eagerly: lets a compiled network run eagerly while hooks are active.
        origin: where the fit began.
        plan: the plan of this pruner's own slimming; None before.
        not_removed: why nothing could be removed physically; None if nothing stood in the way.

    Raises:
        ValueError: nothing to prune, patterns that match nothing.
    """

    def __init__(self, model: LightningModule, settings: Settings, state: Mapping[str, Any], origin: Origin) -> None:
        self._model, self._settings, self._state = model, settings, state
        self.origin = origin
        self.eagerly = Eagerly(model)
        self.plan = _plan(state.get("plan", ""))
        self._applied_plan = _plan(state.get("since", "")) or SlimmingPlan()  # all slimmings, other callbacks' included
        self.not_removed: str | None = state.get("not_removed")
        reattach(model, self._applied_plan)
        self._optimizers: list[Optimizer] = []
        self.granularity = self._found()
        networks = networks_around(model, self.granularity.names)
        self.recorder = InputRecorder(networks, outermost=self.granularity.slims_in_fit)
        sizes = state["sizes"] if self.plan is not None else None
        self._record = Record(networks[-1][1], sizes, state.get("evidence", {}))
        if state.get("inputs") is not None:
            name = state["network"]
            self.recorder.restore(name, model.get_submodule(name), state["inputs"], state["dtype"])
            if self.granularity.slims_in_fit:
                self._learn()
        self.masks = self._restored_masks()

    def _found(self) -> Granularity[Any]:
        granularity = self._settings.find_candidates(self._model)
        for name, reason in granularity.not_pruned.items():
            log.info("layer %r is not pruned: %s", name, reason)
        return granularity

    @property
    def is_ready(self) -> bool:
        """Whether all is known that has to be before candidates are pruned and removed."""
        return not self.granularity.slims_in_fit or self.recorder.inputs is not None

    def learn(self, name: str, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Record the inputs of a module that is about to run, and learn from them if it is the network.

        Returns:
            Whether the candidates have become known by that.

        Raises:
            CaptureError: neither this module nor one inside can be captured.
            ValueError: nothing to prune.
        """
        if not self.recorder.record(name, network, args, kwargs) or not self.granularity.slims_in_fit:
            return False
        before = self.granularity.names
        try:
            with self.recorder.examining():
                self._learn()
        except CaptureError as error:
            if not self.recorder.reject():
                raise
            log.info("%s; trying the next module inside", error)
            return False
        if self.granularity.names != before:
            self._replace_masks(self._restored_masks())
        return True

    def _learn(self) -> None:
        known = set(self.granularity.not_pruned)
        if self.plan is None:
            self._learn_candidates()
        for name, reason in self.granularity.not_pruned.items():
            if name not in known:
                log.info("layer %r is not pruned: %s", name, reason)
        self.measure()

    def _learn_candidates(self) -> None:
        args, kwargs = self.recorder.inputs_on_device()
        self.granularity.learn(self.recorder.network, args, kwargs, self.recorder.name)

    def _restored_masks(self) -> Masks:
        """Those of the state, if it has masks of the same candidates; else fresh ones."""
        restored = self._state.get("kept", {})
        if self.plan is not None:
            self.granularity.keep_only(restored)
            self.granularity.not_pruned |= self._state.get("not_pruned", {})
        names = self.granularity.names
        if restored.keys() == set(names):
            return self._make_masks(restored, self._state.get("held", True))
        if restored and self.recorder.inputs is not None:
            raise ValueError(
                f"the checkpoint has masks for {sorted(restored)}, but the candidates of "
                f"{type(self._model).__name__} are {sorted(names)}; resume with the same model and the same "
                "granularity, include and exclude"
            )
        return self._make_masks()

    def _make_masks(self, kept: Mapping[str, Tensor] | None = None, held: bool = True) -> Masks:
        parameters, names = self.granularity.parameters(), self.parameters
        self._names = {layer: names[parameter] for layer, parameter in parameters.items()}
        return Masks(parameters, self.granularity.companions(), kept, held, self._applied_plan, self._names)

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
    def total(self) -> int:
        """Number of candidates, at full size."""
        return sum(mask.numel() for mask in self.masks.kept.values())

    @property
    def pruned(self) -> int:
        """How many of them are pruned."""
        return self.total - sum(self.masks.num_kept.values())

    @property
    def pruned_fraction(self) -> float:
        """Fraction of them that are pruned."""
        return self.pruned / self.total

    def watch(self, optimizers: Sequence[Optimizer]) -> None:
        """Keep pruned values at zero, from now on and in the state of these optimizers."""
        self._optimizers = list(optimizers)
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
        """Measure the network on the inputs that it got."""
        recorder = self.recorder
        self._record.after = measure_size(recorder.network, recorder.inputs_on_device(), recorder.instances)
        if self.plan is None:
            self._record.before = self._record.after

    def reattach(self) -> None:
        """Attach the plan again where a strategy has replaced batch norms."""
        reattach(self._model, self._applied_plan)

    # ---- pruning

    def decide(
        self, statistics: Mapping[str, FeatureStatistics], gradients: Mapping[str, GradientStatistics]
    ) -> Decision:
        """Rank the candidates, and note for the report why they are ranked so."""
        decision = Decision(self._settings, self.granularity, self.masks, statistics, gradients)
        self._record.note(decision.explained)
        return decision

    def rewind_weights(self, optimizers: Sequence[Optimizer]) -> None:
        """Put the remaining weights back to where the fit began; optimizers begin afresh."""
        self.origin.rewind_weights(self._model, self._applied_plan, optimizers)
        self.masks.apply()

    # ---- slimming

    def slim(self, trainer: Trainer) -> SlimmingPlan | None:
        """Make the network smaller; returns the plan, or None if it cannot be done exactly."""
        try:
            in_fit = self.granularity.slims_in_fit
            plan = slim_in_fit(trainer, self._model, self._slim_network) if in_fit else self._slim_network()
        except (CaptureError, VerificationError) as error:  # a model in training must survive this
            self.not_removed = str(error)
            log.warning("nothing was physically removed, the masks stay: %s", error)
            return None
        self.plan = plan
        carry_plan(self._model)
        self.follow(plan)
        self.eagerly.recompile()
        log.info("slimmed: %s → %s parameters", self._record.before.params, self._record.after.params)
        return plan

    def _slim_network(self) -> SlimmingPlan:
        recorder = self.recorder
        prefix = f"{recorder.name}." if recorder.name else ""
        kept = {name.removeprefix(prefix): mask for name, mask in self.masks.present.items()}
        args, kwargs = recorder.inputs_on_device()
        return self.granularity.slim(recorder.network, args, kwargs, kept).under(recorder.name)

    def follow(self, plan: SlimmingPlan) -> None:
        """Go on with a model that this pruner or another one has made smaller."""
        self._applied_plan = self._applied_plan.then(plan)
        not_pruned = self.granularity.not_pruned
        self.granularity = self._settings.find_candidates(self._model)
        self.granularity.keep_only(self.masks.kept)
        self.granularity.not_pruned = not_pruned
        if self.plan is None and self.recorder.inputs is not None:
            self._learn_candidates()
        self._replace_masks(self._make_masks(self.masks.kept, self.masks.held))
        if self.recorder.inputs is not None:
            self.measure()

    # ---- results and state

    def report(self) -> PruningReport:
        """The candidates and sizes before and now."""
        return self._record.report(
            self.masks,
            granularity=self._settings.granularity,
            removed=dict(self.plan.removed) if self.plan is not None else {},
            not_pruned=dict(self.granularity.not_pruned),
            not_removed=self.not_removed,
        )

    def present_state(self, model: LightningModule) -> dict[str, Any]:
        """As `state_dict`, for another fit; empty for another model, or if another size was loaded into this one."""
        if all(module is not self.recorder.network for module in model.modules()):
            return {}
        parameters = dict(model.named_parameters())

        def fit(masks: Mapping[str, Tensor]) -> bool:
            found = {name: parameters.get(self._names.get(name, "")) for name in masks}
            return all(p is not None and p.shape == masks[name].shape for name, p in found.items())

        if fit(self.masks.present):
            return self.state_dict()
        return self.state_dict() | {"plan": "", "since": ""} if fit(self.masks.kept) else {}  # a dense one was loaded

    def state_dict(self) -> dict[str, Any]:
        """Masks, plan and inputs, as tensors and primitives."""
        return {
            "kept": dict(self.masks.kept),
            "held": self.masks.held,
            "plan": "" if self.plan is None else self.plan.to_json(),
            "since": self._applied_plan.to_json(),
            "sizes": list(astuple(self._record.before)),
            "not_pruned": dict(self.granularity.not_pruned),
            "not_removed": self.not_removed,
            "network": self.recorder.name,
            "inputs": self.recorder.plain_inputs(),
            "dtype": self.recorder.dtype,
            "evidence": {name: dict(found) for name, found in self._record.evidence.items()},
        }


def _plan(text: str) -> SlimmingPlan | None:
    return SlimmingPlan.from_json(text) if text else None
