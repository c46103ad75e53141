"""`slim`: switch channels off and physically remove them, exactly."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_fscreen.compiled import uncompiled
from lightning_fscreen.slimming.apply import apply_change
from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.gates import call_arguments, capture_training
from lightning_fscreen.slimming.interpreter import Off
from lightning_fscreen.slimming.plan import SlimmingPlan
from lightning_fscreen.slimming.planning import find_slots, make_change
from lightning_fscreen.slimming.verify import Verification, VerificationError

log = logging.getLogger(__name__)

BIASES = ("zero", "fold")


def slim(model: nn.Module, keep: Mapping[str, Tensor], example_inputs: Any, bias: str = "zero") -> SlimmingPlan:
    """Switch off channels of batch norms and physically remove them, in place.

    The output stays that of the same network with γ = β = 0 on the pruned channels (bias="zero"), or γ = 0 with β kept
    (bias="fold"), in eval and in train mode. Constants are carried into the biases of the layers that read them or,
    where zero padding meets them, into one channel that stays. What cannot be removed exactly stays, switched off.

    Args:
        model: any module that `torch.export` can capture. Its class, `forward`, modes, devices, dtypes, hooks,
            `requires_grad` and shared parameters stay as they are.
        keep: batch norm → (channels,) bool, True where a channel is kept; those not named keep all.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments of `forward`, at least two
            instances.
        bias: "zero" or "fold".

    Returns:
        The plan that was applied.

    Raises:
        ValueError: an unknown name, a mask of another length or dtype, one that keeps no channel, an unknown bias.
        CaptureError: the model cannot be captured.
        VerificationError: outputs differ in float64, or forward fails on the smaller network.
        The model is untouched after an error.
    """
    model = uncompiled(model)
    check_keep(model, keep)
    check_bias(bias)
    args, kwargs = call_arguments(example_inputs)
    return slim_captured(model, capture_training(model, args, kwargs), keep, args, kwargs, bias)


@torch.inference_mode(False)
def slim_captured(
    network: nn.Module,
    captured: Capture,
    keep: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    bias: str = "zero",
) -> SlimmingPlan:
    """As `slim`, for a network that has been captured and masks that have been checked."""
    undo = switch_off(network, keep, bias)
    try:
        off = {name: _off(network.get_submodule(name), mask) for name, mask in keep.items()}
        slots = find_slots(network, captured, off)
        change = make_change(network, slots)
        if not change.plan:
            return change.plan
        verification = Verification(network, args, kwargs, training=True)
        try:
            apply_change(network, change, verification)
        except VerificationError as error:
            if not slots.assumed:
                raise
            log.warning("sizes seem to be written into forward, their channels stay: %s", error)
            change = make_change(network, find_slots(network, captured, off, literal=True))
            if change.plan:
                apply_change(network, change, verification)
    except BaseException:
        undo()
        raise
    return change.plan


def check_bias(bias: str) -> None:
    """Raise ValueError unless `bias` is one of `BIASES`."""
    if bias not in BIASES:
        raise ValueError(f"unknown bias {bias!r}; choose one of {list(BIASES)}")


def check_keep(model: nn.Module, keep: Mapping[str, Tensor]) -> None:
    """Check masks against the batch norms of a model.

    Raises:
        ValueError: names the first module that does not fit, and what was expected.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for name, mask in keep.items():
        if name not in modules:
            raise ValueError(
                f"keep names {name!r}, which is no batch norm of {type(model).__name__}; they are {list(modules)}"
            )
        channels = modules[name].num_features
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (channels,):
            found = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"keep[{name!r}] must be a bool tensor of shape ({channels},), got {found}")
        if not bool(mask.any()):
            raise ValueError(f"keep[{name!r}] keeps none of {channels} channels; a layer needs at least one")
        if modules[name].weight is None and not bool(mask.all()):
            raise ValueError(f"batch norm {name!r} has no scale to switch channels off with (affine=False)")


@torch.no_grad()
def switch_off(network: nn.Module, keep: Mapping[str, Tensor], bias: str) -> Any:
    """γ = 0, and β = 0 for bias="zero", on the channels that are not kept; returns a function that undoes it."""
    old = []
    for name, mask in keep.items():
        module = network.get_submodule(name)
        for attribute in ("weight", "bias") if bias == "zero" else ("weight",):
            parameter = module._parameters[attribute]
            if parameter is not None:
                old.append((parameter, parameter.detach().clone()))
                parameter[~mask.to(parameter.device)] = 0

    @torch.no_grad()
    def undo() -> None:
        for parameter, values in reversed(old):  # a shared one was saved more than once
            parameter.copy_(values)

    return undo


def _off(module: nn.Module, mask: Tensor) -> Off:
    pruned = ~mask.detach().cpu()
    shift = module._parameters["bias"]
    constant = torch.zeros(len(mask), dtype=torch.float64) if shift is None else shift.detach().cpu().double()
    return Off(pruned, torch.where(pruned, constant, 0.0))
