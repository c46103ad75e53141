"""`weights=FILE`: a run begins with trained weights, of the network or of the whole module."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_fscreen.cli.parts import network_of
from lightning_fscreen.files import is_torch_save
from lightning_fscreen.saving.slimmed import is_slimmed_file, load_slimmed


def load_weights(model: LightningModule, path: str, exclude: str | Sequence[str] | None = None) -> None:
    """Load trained weights into a model; one that was slim when it was saved makes the network as small.

    Args:
        model: the module of a run.
        path: a file of `save_slimmed` (`model.safetensors` of a run), of safetensors, of `torch.save` (a state_dict),
            or a checkpoint of Lightning. The names in it are those of the module, or those of its network.
        exclude: glob patterns over names of modules in the network whose values stay those of `model`: a new head.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no tensors, or could not be read without executing code that is in it.
        PlanError: they do not fit; names the first that differs.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"weights: there is no file {path!r}; leave it out to begin with random weights")
    network = network_of(model)
    if is_slimmed_file(file):
        load_slimmed(network, file, exclude=exclude)
        return
    tensors = {name.replace("_orig_mod.", ""): value for name, value in _tensors(file).items()}  # if it was compiled
    load_slimmed(network, _own(tensors, model, network), exclude=exclude)


def _tensors(file: Path) -> Mapping[str, Tensor]:
    """The state_dict in a file."""
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True) if is_torch_save(file) else load_file(file)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"weights: {str(file)!r} holds no weights that can be loaded safely: {error}. It has to be a state_dict, "
            "written by safetensors or by torch.save(net.state_dict(), …), or a checkpoint of Lightning"
        ) from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):  # of Lightning, timm and others
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        held = list(found)[:5] if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(
            f"weights: {str(file)!r} holds no state_dict but {held}; save one by torch.save(net.state_dict(), …)"
        )
    return found


def _own(tensors: Mapping[str, Tensor], model: LightningModule, network: nn.Module) -> Mapping[str, Tensor]:
    """Those of the network, by the names that they have in it."""
    places = [f"{name}." for name, module in model.named_modules() if module is network and name]
    known = network.state_dict().keys()
    readings = [
        {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for prefix in ("", *places)
    ]
    return max(readings, key=lambda reading: len(known & reading.keys()))
