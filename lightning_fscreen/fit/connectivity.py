"""Which connections do nothing under some masks, in all networks of a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_fscreen.fit.discovery import Discovery
from lightning_fscreen.fit.networks import Network
from lightning_fscreen.modules import named_tensors
from lightning_fscreen.slimming import CaptureError
from lightning_fscreen.slimming.gates import capture_training
from lightning_fscreen.slimming.paths import Paths

log = logging.getLogger(__name__)


class Connectivity:
    """Finds connections that lie on no path from an input of their network to an output.

    Networks are captured when they are first asked about. Of one that cannot be captured nothing is known.

    Args:
        model: the module that is trained.
        found: its candidates and its networks; the networks keep their size.
    """

    def __init__(self, model: LightningModule, found: Discovery) -> None:
        self._model, self._found = model, found
        self._paths: dict[Network, Paths | None] = {}

    def idle(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The connections that do nothing, or would if they were left.

        Args:
            kept: layer → bool mask of its weight, True where a connection is left.

        Returns:
            Layer → bool mask of the same shape, for layers of networks that are understood; empty if candidates are no
            connections.
        """
        if self._found.granularity.slims_in_fit:
            return {}
        members = self._found.granularity.members()
        idle: dict[str, Tensor] = {}
        for network in self._found.recorder.networks.values():
            if (paths := self._paths_of(network)) is None:
                continue
            names = {tensor: name for name, tensor in named_tensors(network.module).items()}
            inside = {layer: names[own.weight] for layer, own in members.items() if own.weight in names}
            found = paths.idle({name: kept[layer] for layer, name in inside.items() if layer in kept})
            idle |= {layer: found[name] for layer, name in inside.items() if name in found}
        return idle

    def _paths_of(self, network: Network) -> Paths | None:
        if network not in self._paths and network.inputs is not None:
            self._paths[network] = self._find(network)
        return self._paths.get(network)

    def _find(self, network: Network) -> Paths | None:
        args, kwargs = network.inputs_on_device()
        try:
            with network.examining(self._model):
                return Paths(network.module, capture_training(network.module, args, kwargs))
        except CaptureError as error:
            log.info("it is not known which connections of %s do nothing: %s", network.describe(), error)
            return None
