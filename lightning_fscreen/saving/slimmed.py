"""Save a slimmed model and load it into a fresh one: safetensors and the plan, no pickle, no tracing."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_fscreen.files import is_torch_save, replacing
from lightning_fscreen.modules import join, named_tensors, uncompiled
from lightning_fscreen.saving.packed import pack, unpack
from lightning_fscreen.saving.partial import left_out, without
from lightning_fscreen.slimming.carried import contradictions, out_of_plan, plan_of
from lightning_fscreen.slimming.fits import check_fits
from lightning_fscreen.slimming.plan import PlanError, SlimmingPlan
from lightning_fscreen.slimming.resize import added_bias_shape, planned_shape
from lightning_fscreen.slimming.rewrite import install
from lightning_fscreen.slimming.state import attach, take_plan

log = logging.getLogger(__name__)

_KEY = "fscreen"
"""The only key of the metadata, since safetensors writes several in an order of chance: JSON of plan and checksum."""
_PARALLEL = "module."  # what DataParallel and DistributedDataParallel put before the names
_OLD_KEYS = "fscreen_plan", "fscreen_sha256"  # of earlier versions
Model = TypeVar("Model", bound=nn.Module)


def save_slimmed(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write weights, buffers and the slimming plan of a model to one safetensors file.

    Tensors that are mostly zeros, as pruned weights leave them, are stored as a bit mask and the values that are left.
    The file is written beside and renamed: an interrupted save leaves the previous file as it was. Equal models give
    equal files, byte for byte.

    A layer that was put into the place of a slimmed one keeps the place's part of the plan, if its sizes allow it: a
    head of other classes can be loaded into a fresh network with those classes. Any other is written as it is, with a
    warning: only a network with the same replacement can read it, since nothing tells what its full size would be.

    Args:
        model: a model that was slimmed, or that holds submodules that were; one that was not is saved as it is.
        path: the file, `*.safetensors` by custom.

    Raises:
        OSError: the folder does not exist or cannot be written.
        PlanError: a slimmed layer has tensors of other sizes than its slimming left, so that the file could not be
            read; nothing is written.

    Example:
        >>> import tempfile
        >>> from lightning_fscreen import load_slimmed, save_slimmed, slim
        >>> def net():
        ...     return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> small = net()
        >>> plan = slim(small, {"1": torch.arange(8) < 5}, torch.randn(2, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_slimmed(small, f"{folder}/net.safetensors")
        ...     again = load_slimmed(net(), f"{folder}/net.safetensors")
        >>> again[3]
        Linear(in_features=5, out_features=2, bias=True)
        >>> torch.equal(again[3].weight, small[3].weight)
        True
    """
    model = uncompiled(model)
    for name, reason in contradictions(model).items():
        raise PlanError(
            f"layer {name!r} cannot be saved, because it could not be loaded: {reason}. To change a slimmed layer by "
            "hand, put a new one into its place; its size can then be the present one or that of another head"
        )
    if replaced := out_of_plan(model):
        log.warning(
            "%s: replaced or removed since the network was slimmed; %r can only be loaded into a network with the same "
            "change",
            ", ".join(replaced),
            os.fspath(path),
        )
    with replacing(path) as partial:
        tensors = {name: _own_storage(tensor) for name, tensor in _persistent(model).items()}
        plan = plan_of(model).to_json()
        about: dict[str, Any] = {"plan": plan, "sha256": digest(plan, tensors)}
        stored, packed = pack(tensors)
        try:
            save_file(stored, partial, metadata={_KEY: json.dumps(about | ({"packed": packed} if packed else {}))})
        except SafetensorError as error:  # how safetensors reports a full disk or a read-only folder
            raise OSError(f"cannot write {str(path)!r}: {error}") from error


def load_slimmed(
    model: Model,
    path: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    exclude: str | Sequence[str] | None = None,
    strict: bool = True,
) -> Model:
    """Make a fresh model as small as the saved one, in place, and load its weights.

    Args:
        model: a fresh, full-size instance of the class that was saved, on any device, of any floating dtype.
        path: a file that `save_slimmed` wrote, or a state_dict of a slim network:
            `load_slimmed(net, torch.load("net.pt", weights_only=True))`.
        exclude: glob patterns over module names ("fc", "head.*"): modules whose values stay those of `model`. They are
            cut where the saved ones were, since they have to fit their neighbours, and may differ in other dimensions.
        strict: whether all other tensors have to fit. With strict=False those that do not are left out likewise, and
            listed in a warning.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: no module to load it into.
        ValueError: a pattern in `exclude` matches no module.
        PlanError: the file is damaged, is something else, or does not fit the model; names the first tensor that
            differs. The model is untouched then.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_slimmed(nn.Linear(3, 2), f"{folder}/linear.safetensors")
        ...     linear = load_slimmed(nn.Linear(3, 2), f"{folder}/linear.safetensors")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_slimmed(nn.Linear(3, 2), f"{folder}/linear.safetensors")
        ...     load_slimmed(nn.Linear(4, 2), f"{folder}/linear.safetensors")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        lightning_fscreen.slimming.plan.PlanError: ...: tensor 'weight' has shape (2, 3), that of the network (2, 4)...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_slimmed(model, path) needs a module, an instance of its class, got {model!r}")
    network = uncompiled(model)
    tensors = _persistent(network)
    if isinstance(path, Mapping):
        source = "the state_dict"
        plan, saved = _from_state_dict(path, network)
    else:
        source = repr(os.fspath(path))
        plan, saved = _from_file(Path(path))
    left: Mapping[str, str] = {}
    if exclude is not None or not strict:
        left = left_out(tensors, plan, saved, exclude, strict)
        plan = without(plan, network, tensors, left)
        saved = {name: tensor for name, tensor in saved.items() if name not in left}
    check_fits(plan, network)
    expected = {name: planned_shape(plan, name, tensor) for name, tensor in tensors.items() if name not in left}
    expected |= {join(name, "bias"): added_bias_shape(plan, network, name) for name in plan.biases}
    for name in sorted({*expected, *saved}):
        if name not in saved:
            raise PlanError(f"{source} has no tensor {name!r}, which {type(network).__name__} needs")
        if name not in expected:
            raise PlanError(f"{source} has a tensor {name!r}, which {type(network).__name__} does not have")
        if tuple(saved[name].shape) != expected[name]:
            found = tuple(saved[name].shape)
            said = f"its plan says {expected[name]}"
            if not plan:
                said = (
                    f"that of the network {expected[name]}; there is no slimming plan, without which nothing slim can "
                    "be loaded: it is in net.state_dict() and in files of save_slimmed"
                )
            raise PlanError(f"{source}: tensor {name!r} has shape {found}, {said}")
    for name, tensor in named_tensors(network).items():
        if name in plan.cuts and name not in saved:  # left out, or a buffer that is not saved
            saved[name] = plan.cut(name, tensor.detach())
    install(network, plan, saved)
    attach(network, plan)
    return model


def is_slimmed_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one of `save_slimmed`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError:
        return False
    return _KEY in metadata or _OLD_KEYS[0] in metadata


def _from_file(path: Path) -> tuple[SlimmingPlan, dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    if is_torch_save(path):
        raise PlanError(
            f"{str(path)!r} is a file of torch.save and not of save_slimmed; a checkpoint of Lightning is loaded by "
            "load_from_checkpoint(MyModule, path), a state_dict by "
            "load_slimmed(net, torch.load(path, weights_only=True))"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            saved: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise PlanError(f"{str(path)!r} is not a whole safetensors file: {error}") from error
    text, checksum, packed = _plan_and_checksum(metadata, path)
    saved = unpack(saved, packed)
    if checksum != digest(text, saved):
        raise PlanError(
            f"{str(path)!r} is damaged: its contents do not have the checksum that it was written "
            "with; copy it again from where it came, or save the model again"
        )
    return SlimmingPlan.from_json(text), saved


def _from_state_dict(state_dict: Mapping[str, Tensor], network: nn.Module) -> tuple[SlimmingPlan, dict[str, Tensor]]:
    """Plan and tensors, copied, those that modules of the network share once."""
    if "state_dict" in state_dict and "pytorch-lightning_version" in state_dict:
        raise PlanError(
            "this is a checkpoint of Lightning; load its file by load_from_checkpoint(MyModule, path), or pass "
            'checkpoint["state_dict"]'
        )
    rest = {name.replace("_orig_mod.", ""): value for name, value in state_dict.items()}  # of compiled modules
    if all(name.startswith(_PARALLEL) for name in rest) and not hasattr(network, _PARALLEL.rstrip(".")):
        rest = {name.removeprefix(_PARALLEL): value for name, value in rest.items()}
    plan, _ = take_plan(rest, network) or (SlimmingPlan(), [])
    shared = network.state_dict().keys() - named_tensors(network).keys()
    for name, value in rest.items():
        if not isinstance(value, Tensor):
            raise PlanError(f"the state_dict holds a {type(value).__name__} as {name!r}, and no tensor")
    return plan, {name: tensor.detach().clone() for name, tensor in rest.items() if name not in shared}


def _plan_and_checksum(metadata: Mapping[str, str], path: Path) -> tuple[str, str | None, Any]:
    """Plan, checksum, and the shapes of packed tensors."""
    if _KEY in metadata:
        try:
            both = json.loads(metadata[_KEY])
            return str(both["plan"]), str(both["sha256"]), both.get("packed", {})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(f"{str(path)!r} is damaged: its slimming plan cannot be read: {error}") from error
    if _OLD_KEYS[0] in metadata:
        return metadata[_OLD_KEYS[0]], metadata.get(_OLD_KEYS[1]), {}
    raise PlanError(
        f"{str(path)!r} holds no slimming plan; it was not written by save_slimmed. A state_dict that safetensors has "
        "saved is loaded by load_slimmed(net, safetensors.torch.load_file(path))"
    )


def digest(plan: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a plan and of tensors on the CPU: names, dtypes, shapes and bytes."""
    found = hashlib.sha256(plan.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _persistent(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, shared ones once."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in named_tensors(model).items() if name in state}


def _own_storage(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and not a view of a storage that another tensor may use, which safetensors refuses."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
