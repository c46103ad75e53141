"""What can be pruned in a model, as far as it is known: it becomes known while the first training steps run."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule

from lightning_fscreen.candidates.granularity import Granularity, require_candidates
from lightning_fscreen.fit.copies import Copies
from lightning_fscreen.fit.gathering import MakeCollector
from lightning_fscreen.fit.networks import Network
from lightning_fscreen.fit.recorder import Recorder
from lightning_fscreen.fit.settings import Settings
from lightning_fscreen.modules import names_of_frozen
from lightning_fscreen.slimming import CaptureError

log = logging.getLogger(__name__)


class Discovery:
    """The candidates of a model, and the networks that hold them.

    Args:
        model: the module that is trained.
        settings: the callback's arguments.
        state: a `state_dict` of the pruner to go on from; empty to begin.
        copies: copies of the network, which have no candidates of their own.

    Attributes:
        granularity: the candidates.
        recorder: the networks and their inputs.
        fixed: whether the network was made smaller, so that no more is learned of what can be pruned.
        fresh: layers that had better be left alone, by how they looked when the fit began, and why.
        frozen: names of the parameters that were not trained when this was made.

    Raises:
        ValueError: nothing to prune, patterns that match nothing.
    """

    def __init__(self, model: LightningModule, settings: Settings, state: Mapping[str, Any], copies: Copies) -> None:
        self._model, self._settings = model, settings
        self._refused: CaptureError | None = None  # the innermost one
        self.frozen = names_of_frozen(model)
        self.granularity: Granularity[Any] = settings.find_candidates(model)
        self.granularity.restore(state.get("structure", {}))
        self.granularity.leave_out(copies.reasons(self.granularity.names))
        # In a fit that goes on, layers no longer look as they did when it began.
        known: Mapping[str, str] | None = state.get("fresh", {} if "kept" in state else None)
        self.fresh = self.granularity.fresh() if known is None else known
        self.granularity.leave_out(self.fresh)
        self._never_ran: dict[str, str] = dict(state.get("never_ran", {}))
        self.granularity.leave_out(self._never_ran)
        self._log_reasons()
        self.recorder = Recorder(model, self.granularity.names, innermost=not self.granularity.slims_in_fit)
        self.recorder.restore(state)
        self.fixed = bool(state.get("plan"))
        if self.fixed or state.get("settled"):
            self.granularity.keep_only(state.get("kept", {}), state.get("not_pruned", {}))
            self.recorder.closed = bool(self.recorder.networks)
        self._learn_again()

    @property
    def is_ready(self) -> bool:
        """Whether all is known that has to be before candidates are pruned and removed."""
        return not self.granularity.slims_in_fit or self.recorder.is_ready

    @property
    def is_final(self) -> bool:
        """Whether the candidates are known, and no network that is yet to be called can change them."""
        return self.is_ready and not (self.granularity.slims_in_fit and self.recorder.awaits_others)

    @property
    def collectors(self) -> dict[str, MakeCollector]:
        """How the sums of activations are made, by network; one for all where networks need not be known."""
        if not self.granularity.slims_in_fit:
            return {"": self.granularity.collector}
        networks = [n for n in self.recorder.networks.values() if any(map(n.holds, self.granularity.names))]
        return {network.name: partial(self.granularity.collector, network=network.name) for network in networks}

    def learn(self, network: Network) -> bool:
        """Learn from a network that has just been found and is about to run.

        Returns:
            Whether something was learned: not if the modules inside it have to be tried.

        Raises:
            CaptureError: it cannot be captured, and holds no other module that may be a network.
            ValueError: nothing to prune.
        """
        try:
            self._learn(network)
        except CaptureError as error:
            if not self.recorder.has_inside(network.name):
                raise
            self._refused = error
            self.recorder.reject(network.name, str(error))
            level = logging.WARNING if network.name else logging.INFO
            log.log(level, "the modules inside %s are tried, each by itself: %s", network.describe(), error)
            return False
        return True

    def _learn(self, network: Network) -> None:
        if not self.granularity.slims_in_fit or self.fixed:
            return
        known = set(self.granularity.not_pruned)
        for name in self.recorder.left_out:  # it may have been a network until this one was called
            self.granularity.forget(name)
        with network.examining(self._model):
            args, kwargs = network.inputs_on_device()
            network.unused = self.granularity.learn(network.module, args, kwargs, network.name)
        self._log_reasons(known)

    def _learn_again(self) -> None:
        for network in self.recorder.networks.values():
            if network.inputs is not None:
                self._learn(network)

    def find_again(self, names: Collection[str]) -> None:
        """Go on with the candidates of these layers, in a model that has become smaller."""
        not_pruned, structure = self.granularity.not_pruned, self.granularity.structure()
        self.granularity = self._settings.find_candidates(self._model)
        self.granularity.restore(structure)
        self.granularity.keep_only(names, not_pruned)
        self._learn_again()

    def require_networks(self) -> None:
        """Check, after a step that looked for networks, that there is one with something to prune.

        Raises:
            CaptureError: there would be, but it cannot be captured.
            ValueError: no module that holds candidates was called as a whole.
        """
        unreached = self.recorder.unreached
        if self._refused is not None and all(name in unreached for name in self.granularity.names):
            raise self._refused
        if not self.is_ready:
            self.recorder.complain()

    def settle(self, names: Sequence[str]) -> bool:
        """Look for no more networks, and leave out what none of them holds.

        Args:
            names: layers with candidates until now.

        Returns:
            Whether that changed them.
        """
        if self.recorder.closed:
            return False
        self.recorder.closed = True
        unreached = self.recorder.unreached
        if not self.granularity.slims_in_fit:  # weights can be pruned wherever they are trained
            unreached = {name: why for name, why in unreached.items() if self.recorder.is_untrained(name)}
        for name in self.recorder.left_out:
            self.granularity.forget(name)
        left = [name for name in self.granularity.names if name not in unreached]
        if left == list(names):
            return False
        require_candidates(left, type(self._model).__name__, "layers", self.granularity.not_pruned | unreached)
        known = set(self.granularity.not_pruned)
        self.granularity.keep_only(left, unreached)
        self._log_reasons(known)
        return True

    def leave_out(self, unseen: Collection[str], reason: str) -> None:
        """Leave layers alone of which nothing was seen."""
        log.warning("layers %s are not pruned: %s", list(unseen), reason)
        self._never_ran |= dict.fromkeys(unseen, reason)
        self.granularity.leave_out(self._never_ran)

    def state_dict(self) -> dict[str, Any]:
        """What is known, as tensors and primitives."""
        return {
            "not_pruned": dict(self.granularity.not_pruned),
            "structure": self.granularity.structure(),
            "fresh": dict(self.fresh),
            "never_ran": dict(self._never_ran),
            "settled": self.recorder.closed,
            "networks": [network.state_dict() for network in self.recorder.networks.values()],
        }

    def _log_reasons(self, known: Collection[str] = ()) -> None:
        for name, reason in self.granularity.not_pruned.items():
            if name not in known:
                log.info("layer %r is not pruned: %s", name, reason)
