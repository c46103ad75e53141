"""`slim`: switch units off and physically remove them, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fscreen.modules import own_tensors, uncompiled
from lightning_fscreen.slimming.apply import Agree, remove_dead_slots, unanimous
from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.copies import Copy, average_exactly, copies_of, take_pruned
from lightning_fscreen.slimming.gates import call_arguments, capture_training
from lightning_fscreen.slimming.inputs import find_inputs
from lightning_fscreen.slimming.interpreter import Off
from lightning_fscreen.slimming.kinds import kind_of, off, parameters_off, switch_of
from lightning_fscreen.slimming.operators import find_slots
from lightning_fscreen.slimming.optimizers import awaiting, follow_plan, optimizers_of, warn_of_orphans
from lightning_fscreen.slimming.plan import SlimmingPlan
from lightning_fscreen.slimming.rewrite import Undo, overwrite
from lightning_fscreen.slimming.slots import Heads

Bias = Literal["zero", "fold"]


def slim(
    model: nn.Module,
    keep: Mapping[str, Tensor],
    example_inputs: Any,
    bias: Bias = "zero",
    optimizers: Optimizer | Iterable[Optimizer] = (),
    follow: nn.Module | Iterable[nn.Module] = (),
) -> SlimmingPlan:
    """Switch off units, and physically remove them, in place.

    Units are the channels of batch norms, the outputs of linear and convolution layers and the heads of attentions (see
    `find_gates`). The output stays that of the same network with γ = β = 0 on the pruned channels, zeros in the rows
    and biases of the pruned neurons (bias="zero"), or with β and the biases kept (bias="fold"), and zeros in the
    columns that read the pruned heads, in eval and in train mode. Constants are carried into the biases of the layers
    that read them or, where zero padding meets them, into one unit that stays. Units that cannot be removed exactly
    stay, switched off.

    Args:
        model: any module that `torch.export` can capture. Its class, `forward`, modes, devices, dtypes, hooks,
            `requires_grad` and shared parameters stay as they are.
        keep: gate → (units,) bool, True where a unit is kept; those not named keep all.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments of `forward`, at least two
            instances.
        bias: "zero" or "fold".
        optimizers: the optimizers in use, one or several. The parameters that become smaller are new objects: an
            optimizer that is not named here goes on with the old ones, without an error. Groups, learning rates,
            schedulers, moments and pending gradients go along. The next steps are those of the masked network where
            updates are element-wise (SGD, Adam, RMSprop, Lion); where they are computed from whole matrices (Muon) they
            are those of the smaller matrices, which differ by the scale that follows from the shape, by what was left
            of the removed momentum, and by rounding in bfloat16. Gains of norms over channels of which some are gone
            (RMSNorm, ConvNeXt-V2's) are scaled to make up for them, so that their next steps differ.
        follow: copies of the model whose values follow it: moving averages, a mean teacher, or modules around such a
            copy (`AveragedModel`, timm's `ModelEmaV3`). On the pruned channels they take the model's γ and β, since
            averages of zeros would take long to be zero; then they lose the same channels, with constants of their own.

    Returns:
        The plan that was applied.

    Raises:
        ValueError: an unknown name, a mask of another length or dtype, one that keeps no channel, an unknown bias;
            optimizers without a parameter of the model, a module to follow without a copy of it.
        NotImplementedError: an optimizer whose state cannot be cut (factored or sharded state, LBFGS).
        CaptureError: the model cannot be captured.
        VerificationError: outputs differ in float64, or forward fails on the smaller network, or a copy would have to
            lose other channels.
        Model, optimizers and copies are untouched after an error.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_fscreen import slim
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
        >>> optimizer = torch.optim.AdamW(net.parameters())
        >>> images, keep = torch.randn(2, 3, 6, 6), torch.tensor([True, False, True, True, False, True, True, True])
        >>> with torch.no_grad():
        ...     net[1].weight[~keep] = net[1].bias[~keep] = 0
        ...     before = net(images)
        >>> plan = slim(net, {"1": keep}, images, optimizers=optimizer)
        >>> net[0], net[3]
        (Conv2d(3, 6, kernel_size=(3, 3), stride=(1, 1)), Conv2d(6, 2, kernel_size=(1, 1), stride=(1, 1)))
        >>> net[0].weight is optimizer.param_groups[0]["params"][0]
        True
        >>> plan.removed
        {'0': 2}
        >>> torch.allclose(net(images), before, atol=1e-6)
        True
    """
    model = uncompiled(model)
    check_bias(bias)
    check_keep(model, {name: mask for name, mask in keep.items() if _is_layer(model, name)})
    followers = [follow] if isinstance(follow, nn.Module) else list(follow)
    used, copies, before = optimizers_of(model, optimizers), copies_of(model, followers), dict(model.named_parameters())
    awaited, (args, kwargs) = awaiting(before), call_arguments(example_inputs)
    captured = capture_training(model, args, kwargs)
    heads = heads_in(model, captured, keep)
    check_keep(model, keep, heads)
    plan = slim_captured(model, captured, keep, args, kwargs, bias, copies, heads=heads)
    replaced = follow_plan(used, model, before, plan)
    warn_of_orphans(used, model, replaced, awaited)
    for module in followers:
        average_exactly(module)
    return plan


@torch.inference_mode(False)
def slim_captured(
    network: nn.Module,
    captured: Capture,
    keep: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    bias: Bias = "zero",
    copies: Sequence[Copy] = (),
    agree: Agree = unanimous,
    heads: Mapping[str, Heads] | None = None,
    round_to: int = 1,
) -> SlimmingPlan:
    """As `slim`, for a network that has been captured, masks that have been checked, and copies that have been found.

    Nobody takes the optimizers along. `agree` has the last word: network and copies are untouched after its error.
    `heads` are those of the network, if they are known. Widths become multiples of `round_to`, or stay.
    """
    known = heads_in(network, captured, keep) if heads is None else heads

    def switched() -> dict[str, Off]:
        return {name: off(*switch_of(network, name, known), ~mask) for name, mask in keep.items()}

    undo = [switch_off(network, keep, bias, known)]
    try:
        undo.append(take_pruned(copies, network, _pruned(network, keep, known)))
        return remove_dead_slots(network, captured, args, kwargs, switched, copies, agree, round_to)
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _is_layer(network: nn.Module, name: str) -> bool:
    return name in dict(network.named_modules()) and kind_of(network.get_submodule(name)) is not None


def heads_in(network: nn.Module, captured: Capture, keep: Iterable[str]) -> Mapping[str, Heads]:
    """The heads, and inputs, of a network, if some of these gates are no layers."""
    unknown = {name for name in keep if not _is_layer(network, name)}
    if not unknown:
        return {}
    slots = find_slots(network, captured, {})
    return slots.heads if unknown <= slots.heads.keys() else slots.heads | find_inputs(slots)


def _pruned(network: nn.Module, keep: Mapping[str, Tensor], heads: Mapping[str, Heads]) -> dict[str, Tensor]:
    """Parameter of a gate → bool, of its shape, True where it is pruned."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    pruned: dict[str, Tensor] = {}
    for gate, mask in keep.items():
        for parameter, entries in parameters_off(*switch_of(network, gate, heads), ~mask):
            name = names[id(parameter)]
            pruned[name] = pruned[name] | entries if name in pruned else entries
    return pruned


def check_bias(bias: str) -> None:
    """Raise ValueError unless `bias` is one of `Bias`."""
    if bias not in get_args(Bias):
        raise ValueError(f"unknown bias {bias!r}; choose one of {list(get_args(Bias))}")


def check_keep(model: nn.Module, keep: Mapping[str, Tensor], heads: Mapping[str, Heads] | None = None) -> None:
    """Check masks against the gates of a model.

    Args:
        model: the model.
        keep: gate → mask.
        heads: those of the model, if they are known.

    Raises:
        ValueError: names the first gate that does not fit, and the mask that it needs.
    """
    heads = heads or {}
    layers = [name for name, module in model.named_modules() if kind_of(module)]
    for name, mask in keep.items():
        if name not in layers and name not in heads:
            raise ValueError(
                f"keep names {name!r}, which is no batch norm, linear or convolution layer of {type(model).__name__}, "
                f"nor an attention whose heads can be followed; they are {[*layers, *heads]}"
            )
        module, kind = switch_of(model, name, heads)
        units = len(heads[name].labels) if name in heads else kind.units(module)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (units,):
            found = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"keep[{name!r}] must be a bool tensor of shape ({units},), got {found}")
        if not bool(mask.any()):
            raise ValueError(f"keep[{name!r}] keeps none of {units} {kind.name}s; a layer needs at least one")
        if not bool(mask.all()) and (lacking := kind.lacking(module)):
            raise ValueError(
                f"{name!r} has no {lacking} of its own to switch {kind.name}s off with (affine=False, or computed by a "
                "parametrization or an older pruning hook); leave it out of keep"
            )


def switch_off(
    network: nn.Module, keep: Mapping[str, Tensor], bias: Bias, heads: Mapping[str, Heads] | None = None
) -> Undo:
    """Zero the weights of the units that are not kept, and their shifts for bias="zero"; returns what undoes it."""
    steps = []
    for name, mask in keep.items():
        module, kind = switch_of(network, name, heads or {})
        weight = own_tensors(module)[0]
        for parameter, entries in parameters_off(module, kind, ~mask):
            if parameter is weight or bias == "zero":
                steps.append(overwrite(parameter, entries, 0.0))

    def undo() -> None:
        for step in reversed(steps):  # a shared one was saved more than once
            step()

    return undo
