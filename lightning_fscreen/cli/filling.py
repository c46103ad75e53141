"""From a composed configuration to the arguments that a model and a data module really take."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig, open_dict

log = logging.getLogger(__name__)

_FROM_DATA = ("num_classes", "in_features", "in_channels")


def has_open_values(config: DictConfig) -> bool:
    """Whether the model's configuration leaves values open (null) that the data determines."""
    return any(key in node and node[key] is None for node in _model_nodes(config) for key in _FROM_DATA)


def fit_to_data(config: DictConfig, data: LightningDataModule) -> None:
    """Fill in the values that the configuration leaves open (null) and the data module knows.

    Args:
        config: of a run.
        data: set up for the fit; its attributes `num_classes` and `image_shape` are used where there are such.
    """
    known: dict[str, Any] = {"num_classes": getattr(data, "num_classes", None)}
    if shape := getattr(data, "image_shape", None):
        known |= {"in_features": prod(shape), "in_channels": shape[0]}
    nodes = [*_model_nodes(config), *(node for node in (config.callbacks or {}).values() if "num_classes" in node)]
    with open_dict(config):
        for node in nodes:
            for key, value in known.items():
                if key in node and node[key] is None:
                    node[key] = value


def leave_out_unknown(config: DictConfig) -> None:
    """Take out what a class of the user's own does not take, so that `model._target_=my_module.MyModule` is enough.

    The other arguments are those of the configuration whose target it replaces. They are logged; what was
    given on the command line stays, and so does everything that goes to classes of this package: a misspelling is an
    error there.
    """
    places = {"data": config.data, "model": config.model}
    if isinstance(config.model, DictConfig) and isinstance(config.model.get("net"), DictConfig):
        places = {"model.net": config.model.net} | places
    for place, node in places.items():
        if "_target_" not in node or node["_target_"].startswith("lightning_fscreen."):
            continue
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            continue
        given = _given(place)
        unknown = [str(key) for key in node if not str(key).startswith("_") and key not in (*parameters, *given)]
        if unknown:
            log.info("%s takes no %s: left out of %s", node["_target_"], ", ".join(unknown), place)
            with open_dict(config):
                for key in unknown:
                    del node[key]


def _model_nodes(config: DictConfig) -> Iterator[DictConfig]:
    yield config.model
    if isinstance(config.model.get("net"), DictConfig):
        yield config.model.net


def _given(place: str) -> Mapping[str, str]:
    """Keys of a node that were given on the command line."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    names = [override.lstrip("+~").partition("=")[0] for override in overrides]
    inside = [name.removeprefix(f"{place}.") for name in names if name.startswith(f"{place}.")]
    return {name.partition(".")[0]: name for name in inside}
