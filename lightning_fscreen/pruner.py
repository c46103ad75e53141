"""What a callback does to one model: candidates, masks and slimming, and what a checkpoint has to know about them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_fscreen.collect import FeatureStatistics
from lightning_fscreen.criteria import Explained, Ranked
from lightning_fscreen.gradients import GradientStatistics
from lightning_fscreen.granularity import Granularity
from lightning_fscreen.masks import Masks
from lightning_fscreen.network import InputRecorder, networks_around
from lightning_fscreen.ranking import Scope, rank_and_prune
from lightning_fscreen.report import LayerReport, PruningReport, Size, measure_size
from lightning_fscreen.resume import carry_plan
from lightning_fscreen.settings import Settings
from lightning_fscreen.slimming import CaptureError, SlimmingPlan, VerificationError
from lightning_fscreen.slimming.resize import reattach
from lightning_fscreen.surgery import slim_in_fit

log = logging.getLogger(__name__)


class Pruner:
    """The candidates of one model, what is pruned of them, and what was physically removed.

    Args:
        model: the module that is trained, full-size or as small as `state` says.
        settings: the callback's arguments.
        state: what `state_dict` gave, to go on from; empty to begin.
        on_met: called when the network has been called for the first time, before it runs.

    Raises:
        ValueError: nothing to prune, patterns that match nothing.
    """

    def __init__(
        self,
        model: LightningModule,
        settings: Settings,
        state: Mapping[str, Any],
        on_met: Callable[[], None],
    ) -> None:
        self._model = model
        self._settings = settings
        self._on_met = on_met
        self._state = dict(state)
        self.plan: SlimmingPlan | None = _plan(self._state.pop("plan", ""))
        self._since = _plan(self._state.pop("since", "")) or SlimmingPlan()  # removed by us and by others
        self.not_removed: str | None = self._state.pop("not_removed", None)
        self.kept: dict[str, Tensor] = {}  # at full size, also after slimming
        self.num_kept: dict[str, int] = {}
        self._evidence: dict[str, dict[str, Any]] = dict(self._state.pop("evidence", {}))
        reattach(model, self._since)
        self._masks = Masks({})
        self._optimizers: list[Optimizer] = []
        self.granularity = self._found()
        networks = networks_around(model, self.granularity.names)
        self.recorder = InputRecorder(networks, on_inputs=self._meet if self.granularity.slims_in_fit else None)
        self._after = measure_size(networks[-1][1], None, 1)
        self._before = Size(*self._state["sizes"]) if self.plan is not None else self._after
        if self._state.get("inputs") is not None:
            name = self._state["network"]
            self.recorder.set(name, model.get_submodule(name), self._state["inputs"], self._state["dtype"])
            if self.granularity.slims_in_fit:
                self._look()
        self._take_over()

    def _found(self) -> Granularity[Any]:
        granularity = self._settings.find_candidates(self._model)
        for name, reason in granularity.not_pruned.items():
            log.info("layer %r is not pruned: %s", name, reason)
        return granularity

    def _look(self) -> None:
        """Learn from the network and its inputs, which are known now."""
        known = set(self.granularity.not_pruned)
        if self.plan is None:
            self._learn()
        for name, reason in self.granularity.not_pruned.items():
            if name not in known:
                log.info("layer %r is not pruned: %s", name, reason)
        self.measure()

    def _learn(self) -> None:
        args, kwargs = self.recorder.inputs_on_device()
        self.granularity.learn(self.recorder.network, args, kwargs, self.recorder.name)

    def _meet(self) -> None:
        """The network is being called for the first time: go on with what it turns out to be."""
        names = self.granularity.names
        self._look()
        if self.granularity.names != names:
            self._take_over()
        self._on_met()

    def _take_over(self) -> None:
        """Fresh masks, with what was pruned before, if these are the same candidates."""
        restored = self._state.get("kept", {})
        if self.plan is not None:
            self.granularity.keep_only(restored)
            self.granularity.not_pruned |= self._state.get("not_pruned", {})
        masks = Masks(self.granularity.parameters(), self.granularity.companions())
        if restored.keys() == masks.kept.keys():
            self.kept = {name: mask.to(masks.kept[name].device) for name, mask in restored.items()}
            masks.set(self._current())
        elif restored and self.recorder.inputs is not None:
            raise ValueError(
                f"the checkpoint has masks for {sorted(restored)}, but the candidates of "
                f"{type(self._model).__name__} are {sorted(masks.kept)}; resume with the same model and the same "
                "granularity, include and exclude"
            )
        else:
            self.kept = dict(masks.kept)
        self.num_kept = {name: int(mask.sum()) for name, mask in self.kept.items()}
        self._replace_masks(masks)

    def _replace_masks(self, masks: Masks) -> None:
        """Other masks from now on, over the parameters that the model has now; optimizers are watched as they were."""
        self._masks.unwatch()
        self._masks = masks
        if self._optimizers:
            self.watch(self._optimizers)

    def _current(self) -> dict[str, Tensor]:
        """The masks at the size that the network has now; constants that slimming put into pruned places are kept."""
        masks = {name: self._since.cut(f"{name}.weight", mask) for name, mask in self.kept.items()}
        if self._since:
            parameters = dict(self._model.named_parameters())
            for name, mask in masks.items():
                weight = parameters.get(f"{name}.weight")
                if weight is not None and weight.shape == mask.shape:
                    masks[name] = mask | (weight.detach() != 0).to(mask.device)
        return masks

    # ---- masks

    @property
    def parameters(self) -> dict[Tensor, str]:
        """Names of the model's parameters."""
        return {parameter: name for name, parameter in self._model.named_parameters()}

    @property
    def total(self) -> int:
        """Number of candidates, at full size."""
        return sum(mask.numel() for mask in self.kept.values())

    @property
    def pruned(self) -> int:
        """How many of them are pruned."""
        return self.total - sum(self.num_kept.values())

    @property
    def size(self) -> Size:
        """Size of the network now."""
        return self._after

    def watch(self, optimizers: Sequence[Optimizer]) -> None:
        """Keep what is pruned at zero, from now on and in the state that the optimizers have."""
        self._optimizers = list(optimizers)
        self._masks.set(self._masks.kept, optimizers)
        self._masks.watch(optimizers)

    def unwatch(self) -> None:
        """Take all hooks away."""
        self.recorder.stop()
        self._masks.unwatch()
        self._optimizers = []

    def measure(self) -> None:
        """Measure the network on the inputs that it got."""
        recorder = self.recorder
        self._after = measure_size(recorder.network, recorder.inputs_on_device(), recorder.instances)
        if self.plan is None:
            self._before = self._after

    def reattach(self) -> None:
        """Put back what the network loses where a strategy replaces its batch norms."""
        reattach(self._model, self._since)

    def mask_gradients(self) -> None:
        """Zero the gradients of what is pruned."""
        self._masks.mask_gradients()

    def apply_masks(self) -> None:
        """Zero what is pruned, whatever has happened to it."""
        self._masks.apply()

    def rank(
        self,
        score: Callable[[Mapping[str, Any]], Mapping[str, Tensor]],
        statistics: Mapping[str, FeatureStatistics],
        gradients: Mapping[str, GradientStatistics],
        fraction: float,
        scope: Scope,
        min_kept: int,
    ) -> dict[str, Tensor]:
        """New masks that prune a fraction of all candidates.

        Args:
            score: layer → what a criterion needs to know; returns scores by layer.
            statistics: of activations, by layer.
            gradients: by layer.
            fraction: of the candidates at full size.
            scope: "global" or "layer".
            min_kept: floor by layer.
        """
        kept = self._masks.kept
        total, present = self.total, sum(mask.numel() for mask in kept.values())
        if present < total:
            pruned = total - sum(int(mask.sum()) for mask in self.kept.values())
            gone = pruned - (present - sum(self._masks.num_kept.values()))  # pruned, and removed by another callback
            fraction = min(max((fraction * total - gone) / present, 0.0), 1.0)
        scores = score(self.ranked(statistics, gradients))
        units = self.granularity.units()
        return rank_and_prune(scores, kept, fraction, scope=scope, min_kept=min_kept, units=units)

    def ranked(
        self, statistics: Mapping[str, FeatureStatistics], gradients: Mapping[str, GradientStatistics]
    ) -> dict[str, Ranked]:
        """What a criterion needs to know, by layer."""
        return self.granularity.ranked(self._masks.kept, statistics, gradients)

    def note_evidence(self, explained: Mapping[str, Explained]) -> None:
        """Remember for the report why layers are ranked as they are."""
        for name, evidence in explained.items():
            found = evidence.to_dict()
            if found.get("trusted") != self._evidence.get(name, {}).get("trusted"):
                log.info("layer %r: %s", name, evidence)
            self._evidence[name] = found

    def prune(
        self,
        kept: Mapping[str, Tensor],
        statistics: Mapping[str, FeatureStatistics],
        trainer: Trainer,
        hold: bool = True,
    ) -> None:
        """Replace the masks by those that `rank` gave; or, unless they are to `hold`, zero once what they prune."""
        if not hold:
            self._masks.zero_once(kept)
            self.num_kept = {name: int(self._full_size(name, mask).sum()) for name, mask in kept.items()}
            return
        before = self._masks.kept
        self._masks.set(kept, trainer.optimizers)
        pruned = {name: before[name] & ~mask for name, mask in self._masks.kept.items()}
        self.granularity.after_pruning(pruned, statistics)
        self.kept = {name: self._full_size(name, mask) for name, mask in self._masks.kept.items()}
        self.num_kept = {name: int(mask.sum()) for name, mask in self.kept.items()}

    @torch.no_grad()
    def rewind(self, weights: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> None:
        """Put what is left back to earlier values (of a state dict at full size); optimizers begin afresh."""
        for name, value in self._model.state_dict(keep_vars=True).items():
            if isinstance(value, Tensor) and name in weights:
                value.copy_(self._since.cut(name, weights[name].to(value.device)))
        self._masks.apply()
        for optimizer in optimizers:
            optimizer.state.clear()

    def _full_size(self, name: str, current: Tensor) -> Tensor:
        full = self.kept[name]
        if full.shape == current.shape:
            return current
        places = self._since.cut(f"{name}.weight", torch.arange(full.numel(), device=full.device).view(full.shape))
        return full.flatten().index_copy(0, places.flatten(), current.flatten()).view(full.shape)

    # ---- slimming

    def slim(self, trainer: Trainer) -> SlimmingPlan | None:
        """Make the network smaller; returns the plan, or None if that turns out to be impossible."""
        try:
            if self.granularity.slims_in_fit:
                plan = slim_in_fit(trainer, self._model, self._slim_network)
            else:
                plan = self._slim_network()
        except (CaptureError, VerificationError) as error:  # a model in training must survive this
            self.not_removed = str(error)
            log.warning("nothing was physically removed, the masks stay: %s", error)
            return None
        self.plan = plan
        carry_plan(self._model)
        self.follow(plan)
        log.info("slimmed: %s → %s parameters", self._before.params, self._after.params)
        return plan

    def _slim_network(self) -> SlimmingPlan:
        recorder = self.recorder
        prefix = f"{recorder.name}." if recorder.name else ""
        kept = {name.removeprefix(prefix): mask for name, mask in self._masks.kept.items()}
        args, kwargs = recorder.inputs_on_device()
        return self.granularity.slim(recorder.network, args, kwargs, kept).under(recorder.name)

    def follow(self, plan: SlimmingPlan) -> None:
        """Something was removed from the model, by this pruner or by another one: go on with what is left."""
        self._since = self._since.then(plan)
        not_pruned = self.granularity.not_pruned
        self.granularity = self._settings.find_candidates(self._model)
        self.granularity.keep_only(self.kept)
        self.granularity.not_pruned = not_pruned
        if self.plan is None and self.recorder.inputs is not None:
            self._learn()
        masks = Masks(self.granularity.parameters(), self.granularity.companions())
        masks.set(self._current())
        self._replace_masks(masks)
        if self.recorder.inputs is not None:
            self.measure()

    # ---- what others ask for

    def report(self) -> PruningReport:
        """What pruning has done so far."""
        return PruningReport(
            granularity=self._settings.granularity,
            layers=tuple(
                LayerReport(name, mask.numel(), int(mask.sum()), self._evidence.get(name))
                for name, mask in self.kept.items()
            ),
            before=self._before,
            after=self._after,
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
            return all(
                f"{name}.weight" in parameters and parameters[f"{name}.weight"].shape == mask.shape
                for name, mask in masks.items()
            )

        if fit(self._current()):
            return self.state_dict()
        return self.state_dict() | {"plan": "", "since": ""} if fit(self.kept) else {}  # a dense checkpoint was loaded

    def state_dict(self) -> dict[str, Any]:
        """Masks, plan and inputs, as tensors and primitives."""
        return {
            "kept": dict(self.kept),
            "plan": "" if self.plan is None else self.plan.to_json(),
            "since": self._since.to_json(),
            "sizes": [self._before.params, self._before.nonzero, self._before.macs],
            "not_pruned": dict(self.granularity.not_pruned),
            "not_removed": self.not_removed,
            "network": self.recorder.name,
            "inputs": self.recorder.plain_inputs(),
            "dtype": self.recorder.dtype,
            "evidence": {name: dict(found) for name, found in self._evidence.items()},
        }


def _plan(text: str) -> SlimmingPlan | None:
    return SlimmingPlan.from_json(text) if text else None
