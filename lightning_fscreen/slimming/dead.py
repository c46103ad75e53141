"""Remove units and channels that are left without incoming or without outgoing weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_fscreen.slimming.capture import capture, evaluating, named_tensors
from lightning_fscreen.slimming.liveness import live_slots, removed_constants
from lightning_fscreen.slimming.operators import SlotInterpreter
from lightning_fscreen.slimming.plan import SlimmingPlan, attach_plan
from lightning_fscreen.slimming.rewrite import install
from lightning_fscreen.slimming.slots import SlotGraph

_TOLERANCE = 1e-9  # relative, in float64


class VerificationError(RuntimeError):
    """The slimmed network would not compute the same function; the network was left as it was."""


def remove_dead_units(
    network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> SlimmingPlan:
    """Physically remove hidden units and channels that do nothing, in place; outputs in eval mode stay the same.

    Units without outgoing weights are removed with all that only they read; units without incoming weights put out a
    constant, which is carried into the biases of the layers that read it. What cannot be removed exactly stays.

    Args:
        network: any module that `torch.export` can capture.
        args: example inputs of its forward, with at least two instances so that no size is 1 by chance.
        kwargs: example keyword inputs.

    Returns:
        The plan that was applied; false if there was nothing to remove.

    Raises:
        CaptureError: the network cannot be captured.
        VerificationError: outputs differ in float64 on the example or on random inputs.
        The network is untouched after an error.
    """
    kwargs = dict(kwargs or {})
    slots = SlotInterpreter(network, capture(network, args, kwargs)).run()
    plan, folded = plan_dead(network, slots)
    if not plan:
        return plan
    tensors = {
        name: tensor.detach().double() for name, tensor in named_tensors(network).items() if tensor.is_floating_point()
    }
    inputs = [(args, kwargs), _random_like((args, kwargs))]
    before = [_run(network, tensors, *each) for each in inputs]
    changed = {**tensors, **{name: tensor.to(_device(network)) for name, tensor in folded.items()}}
    new = {name: plan.cut(name, tensor) for name, tensor in changed.items() if name in plan.cuts or name in folded}
    undo = install(network, plan, new)
    try:
        after = [_run(network, {**tensors, **new}, *each) for each in inputs]
        error = max(_relative_error(a, b) for a, b in zip(before, after, strict=True))
        if not error <= _TOLERANCE:
            raise VerificationError(
                f"removing dead units from {type(network).__name__} would change its outputs by {error:.1e} (relative, "
                f"float64), so nothing was removed. Its forward does something that the captured graph does not show"
            )
    except BaseException:
        undo()
        raise
    attach_plan(network, plan)
    return plan


def plan_dead(network: nn.Module, slots: SlotGraph) -> tuple[SlimmingPlan, dict[str, Tensor]]:
    """The plan that removes all dead slots, and the weights and biases that take over their constants (float64)."""
    tensors = named_tensors(network)
    readers_of: dict[str, int] = {}
    for reader in slots.readers:
        readers_of[reader.weight] = readers_of.get(reader.weight, 0) + 1
    foldable = {
        reader.weight
        for reader in slots.readers
        if reader.module is not None and not reader.padded and readers_of[reader.weight] == 1
    }
    for reader in slots.readers:
        if readers_of[reader.weight] > 1:  # a shared layer meets different constants in one weight
            reader.known = reader.known & (reader.constant == 0)
    live = live_slots(slots, foldable)
    cuts: dict[str, dict[int, tuple[int, ...]]] = {}
    for (name, dim), labels in slots.dims.items():
        kept = live[labels].nonzero().flatten()
        if len(kept) < len(labels):
            cuts.setdefault(name, {})[dim] = tuple(kept.tolist())
    folded: dict[str, Tensor] = {}
    biases = []
    modules = dict(network.named_modules())
    for reader in slots.readers:
        gone, carrier = removed_constants(reader, live, reader.weight in foldable)
        if not bool(gone.any()):
            continue
        if carrier is not None:
            weight = tensors[reader.weight].detach().cpu().double().movedim(reader.input_dim, -1).clone()
            share = (reader.constant / reader.constant[carrier]) * gone
            weight[..., carrier] += weight @ share
            folded[reader.weight] = weight.movedim(-1, reader.input_dim)
            continue
        assert reader.module is not None
        name = f"{reader.module}.bias" if reader.module else "bias"
        bias = modules[reader.module].bias
        if bias is None:
            biases.append(reader.module)
        old = torch.zeros(len(reader.outputs), dtype=torch.float64) if bias is None else bias.detach().cpu().double()
        folded[name] = old + reader.matrix @ torch.where(gone, reader.constant, 0.0)
        if bias is None:  # it is cut with the rows it belongs to
            folded[name] = folded[name][live[reader.outputs]]
    groups = {
        module: int(live[labels].sum()) for module, labels in slots.depthwise.items() if not bool(live[labels].all())
    }
    shapes = {name: tuple(tensors[name].shape) for name in cuts}
    return SlimmingPlan(shapes, cuts, groups, tuple(biases), dict(slots.pinned)), folded


def _run(
    network: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    args, kwargs = pytree.tree_map(double, (args, kwargs))
    with evaluating(network), torch.no_grad():
        output = torch.func.functional_call(network, dict(tensors), args, kwargs)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _random_like(inputs: Any) -> Any:
    """Normal noise in place of every floating input, from a generator of its own."""
    generator = torch.Generator().manual_seed(0)

    def noise(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return torch.randn(value.shape, generator=generator).to(value)
        return value

    return pytree.tree_map(noise, inputs)


def _relative_error(first: list[Tensor], second: list[Tensor]) -> float:
    error = 0.0
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel() and a.is_floating_point():
            error = max(error, float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)))
    return error


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
