"""Does a slimming plan agree with itself, and with the network that it is to be applied to?"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_fscreen.modules import join, named_tensors, own_tensors
from lightning_fscreen.slimming.attributes import Setting, Size
from lightning_fscreen.slimming.plan import PlanError, SlimmingPlan, module_of_gate


def check_fits(plan: SlimmingPlan, network: nn.Module) -> None:
    """Check that a plan fits a network and agrees with itself, before anything is changed.

    What it says twice is compared: shapes, rows and groups, what batch norms keep and what they select. Nothing is
    traced: indices that only say where a remaining tensor came from could be others without being noticed.

    Raises:
        PlanError: names the first tensor or module that differs.
    """
    tensors = named_tensors(network)
    for name, dims in plan.cuts.items():
        if name not in tensors:
            raise PlanError(
                f"the plan cuts {name!r}, which {type(network).__name__} does not have; is it another model?"
            )
        shape, planned = tuple(tensors[name].shape), tuple(plan.shapes.get(name, ()))
        if shape != planned:
            raise PlanError(
                f"the plan was made for {name!r} of shape {planned}, this model's has shape {shape}; "
                "pass a fresh, full-size instance of the model that was slimmed"
            )
        for dim, kept in dims.items():
            _check_indices(name, dim, kept, shape)
    if stray := plan.shapes.keys() - plan.cuts.keys():
        raise PlanError(f"the plan has a shape of {min(stray)!r}, which it does not cut")
    modules = dict(network.named_modules())
    first = {id(tensor): name for name, tensor in reversed(list(tensors.items()))}
    for name in (*plan.removed, *(module_of_gate(gate, modules) for gate in plan.kept_for)):
        if name not in modules:
            raise PlanError(f"the plan removes parts of {name!r}, which {type(network).__name__} does not have")
    for name in (*plan.groups, *plan.biases):
        if not isinstance(modules.get(name), nn.Linear | _ConvNd):
            raise PlanError(f"the plan changes layer {name!r}, which {type(network).__name__} does not have")
    for name, values in plan.attributes.items():
        for attribute, (before, after) in values.items():
            found = getattr(modules.get(name), "__dict__", {}).get(attribute, "missing")
            if found != before or isinstance(found, bool):
                raise PlanError(
                    f"the plan was made for {join(name, attribute)!r} equal to {before}, this model's is {found}; "
                    "pass a fresh, full-size instance of the model that was slimmed"
                )
            if attribute.startswith("_") or not (
                _is_smaller(after, before) if isinstance(before, int | tuple) else _is_eps(after, before, plan, name)
            ):
                raise PlanError(f"the plan sets {join(name, attribute)!r} to {after}, which does not follow {before}")
    for name, sizes in plan.sizes.items():
        if name not in modules:
            raise PlanError(f"the plan changes sizes in {name!r}, which {type(network).__name__} does not have")
        for size in sizes:
            if not 0 <= size.place < size.sizes or min(size.before, size.after) < 1 or size.before == size.after:
                raise PlanError(
                    f"the plan makes {size.after} of size {size.before} in a call of {size.name} in {name!r}, at place "
                    f"{size.place} of {size.sizes}, which is no other size"
                )
    for name in plan.selects:
        _check_select(plan, name, modules.get(name), type(network).__name__, first)
    norms = [name for name in plan.removed if isinstance(modules[name], _BatchNorm)]
    for name in (*norms, *plan.streams):  # batch norms are listed where they read fewer channels than there are
        if name not in plan.selects:
            raise PlanError(f"the plan does not say which channels batch norm {name!r} selects")
    for name in plan.biases:
        if modules[name].bias is not None:
            raise PlanError(f"the plan adds a bias to layer {name!r}, which has one; is it another model?")
    for name, module in modules.items():
        weight, _ = own_tensors(module)
        if isinstance(module, nn.Linear | _ConvNd) and id(weight) in first:
            _check_groups(plan, name, module, first[id(weight)])


def _check_select(
    plan: SlimmingPlan, name: str, module: nn.Module | None, network: str, first: Mapping[int, str]
) -> None:
    if not isinstance(module, _BatchNorm):
        raise PlanError(f"the plan selects channels for batch norm {name!r}, which {network} does not have")
    tensor = module.weight if module.weight is not None else module.running_mean
    shape = () if tensor is None else tuple(tensor.shape)
    _check_indices(f"{name} (selected channels)", 0, plan.selects[name], shape, repeated=True)
    planned = plan.cuts.get(first.get(id(tensor), ""), {}).get(0)
    own = planned if planned is not None else tuple(range(shape[0]))
    if len(plan.selects[name]) != len(own):
        raise PlanError(
            f"the plan selects {len(plan.selects[name])} channels for batch norm {name!r}, which has {len(own)}"
        )
    if name not in plan.streams and name not in plan.removed:
        raise PlanError(f"the plan selects channels for batch norm {name!r}, of which it removes none")
    if name in plan.streams:  # older versions did not write it
        stream = plan.streams[name]
        _check_indices(f"{name} (its input)", 0, stream, shape)
        # Of a channel whose input is gone (its scale is zero), the one before it.
        if plan.selects[name] != tuple(max(bisect_right(stream, channel) - 1, 0) for channel in own):
            raise PlanError(f"the plan selects other channels for batch norm {name!r} than those that it keeps")


def _check_groups(plan: SlimmingPlan, name: str, module: nn.Linear | _ConvNd, weight: str) -> None:
    cuts = plan.cuts.get(weight, {})
    planned = plan.groups.get(name)
    if not isinstance(module, _ConvNd) or module.groups == 1:
        if planned is not None:
            raise PlanError(f"the plan gives layer {name!r} {planned} groups, but it has none")
        return
    sizes = [len(cuts[dim]) if dim in cuts else module.weight.shape[dim] for dim in (0, 1)]
    transposed = isinstance(module, _ConvTransposeNd)
    single = module.weight.shape[0] // module.groups == 1 if transposed else module.weight.shape[1] == 1
    groups = module.groups if planned is None else planned
    per_group = module.weight.shape[0] // module.groups
    # Groups of one input channel go one by one, the last one can lose rows; larger ones keep the same channels
    # each, until one is left of each.
    rows = Counter(row // per_group for row in cuts.get(0, range(module.weight.shape[0])))
    fits = len(rows) == groups and len(set(rows.values())) == 1
    if single and groups > 1:
        fits = fits and sizes[0] == groups * per_group
    if not single and planned is not None:
        fits = fits and (sizes[0] == groups if transposed else sizes[1] == 1)
    if not fits:
        raise PlanError(f"the plan gives layer {name!r} {groups} groups, which its {sizes[0]} rows do not fill")


def _is_eps(after: Setting, before: float | None, plan: SlimmingPlan, module: str) -> bool:
    """Whether it is what is added to a mean over channels that has lost some: larger by as much as they are fewer."""
    cuts = [(name, dim, kept) for name, dims in plan.cuts.items() for dim, kept in dims.items()]
    ratios = [plan.shapes[name][dim] / len(kept) for name, dim, kept in cuts if name.rpartition(".")[0] == module]
    starts = [torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)] if before is None else [before]
    return isinstance(after, float) and any(
        math.isclose(after, start * ratio, rel_tol=1e-6) for start in starts for ratio in ratios
    )


def _is_smaller(after: Setting, before: Size) -> bool:
    if not isinstance(after, int | tuple):
        return False
    first, second = (size if isinstance(size, tuple) else (size,) for size in (after, before))
    return len(first) == len(second) and all(1 <= one <= other for one, other in zip(first, second, strict=True))


def _check_indices(name: str, dim: int, kept: tuple[int, ...], shape: tuple[int, ...], repeated: bool = False) -> None:
    if not 0 <= dim < len(shape):
        raise PlanError(f"the plan cuts dimension {dim} of {name!r}, which has shape {shape}")
    if not kept or any(second < first or (second == first and not repeated) for first, second in pairwise(kept)):
        raise PlanError(f"the plan's indices for dimension {dim} of {name!r} are empty, repeated or not ascending")
    if kept[0] < 0 or kept[-1] >= shape[dim]:
        wrong = kept[0] if kept[0] < 0 else kept[-1]
        raise PlanError(f"the plan keeps index {wrong} of dimension {dim} of {name!r}, which has shape {shape}")
