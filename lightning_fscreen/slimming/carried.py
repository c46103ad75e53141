"""What a network knows of its slimmings: every layer its own part of the plan, every module around it those of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_fscreen.modules import join, tensors_of
from lightning_fscreen.slimming.plan import SlimmingPlan, module_of_gate
from lightning_fscreen.slimming.select import selected

_PART = "_fscreen_plan"
_PARTS = "_fscreen_parts"


def attach_plan(network: nn.Module, plan: SlimmingPlan) -> None:
    """Remember on every layer how it was slimmed, after its earlier slimmings; copies and parts keep it."""
    earlier = parts_of(network, plan)
    for name, own in _by_module(network, plan).items():
        setattr(network.get_submodule(name), _PART, earlier[name].then(own) if name in earlier else own)
    _remember(network)


def attach_lost_plan(network: nn.Module, plan: SlimmingPlan) -> None:
    """As `attach_plan`, of a plan that was attached already, to the modules that have been replaced since."""
    for name, own in _by_module(network, plan).items():
        module = network.get_submodule(name)
        if own_part(module) is None:
            setattr(module, _PART, own)
    _remember(network)


def detach_plans(network: nn.Module) -> None:
    """Forget how the layers were slimmed."""
    for module in network.modules():
        module.__dict__.pop(_PART, None)
        module.__dict__.pop(_PARTS, None)


def plan_of(model: nn.Module) -> SlimmingPlan:
    """The plan of all slimmings of a model or of its parts so far; an empty one if there were none."""
    return join_parts(parts_of(model))


def parts_of(model: nn.Module, latest: SlimmingPlan | None = None) -> dict[str, SlimmingPlan]:
    """Layer → its part of the plan, in the layer's own names.

    A layer that was put into the place of a slimmed one takes its part over, if its tensors have as many elements
    along the dimensions that were cut: a new head for other classes reads the same features. Layers of a block that
    was replaced as a whole do not.

    Args:
        model: the network.
        latest: a plan that was applied but is not attached yet; the parts are those before it.
    """
    modules = dict(model.named_modules())
    found: dict[str, SlimmingPlan] = {}
    for name, module in modules.items():
        if (part := own_part(module)) is not None:
            sizes = _sizes(name, module, latest)
            found[name] = _with_new_bias(_as_it_is(part, module, sizes) or part, module, sizes)
    for around, module in modules.items():
        for layer, part in module.__dict__.get(_PARTS, {}).items():
            new = module._modules.get(layer)  # noqa: SLF001  # only what it holds itself
            if new is None or join(around, layer) in found:
                continue
            fitting = _as_it_is(part, new, _sizes(join(around, layer), new, latest))
            if fitting is not None:
                own = replace(fitting, biases=())  # whether it has a bias is its own affair
                found[join(around, layer)] = _with_new_bias(own, new, _sizes(join(around, layer), new, latest))
    return {name: found[name] for name in modules if name in found}


def own_part(module: nn.Module) -> SlimmingPlan | None:
    """How a layer itself was slimmed, in its own names; None if it was not."""
    part = module.__dict__.get(_PART)
    return part if isinstance(part, SlimmingPlan) else None


def out_of_plan(model: nn.Module) -> list[str]:
    """Layers that were replaced or removed after they had been slimmed, so that their full size is not known."""
    parts = parts_of(model)
    remembered = [
        join(around, layer) for around, module in model.named_modules() for layer in module.__dict__.get(_PARTS, {})
    ]
    return sorted({name for name in remembered if name not in parts})


def contradictions(model: nn.Module) -> dict[str, str]:
    """Slimmed layers whose tensors have other sizes than their slimming left, and how they differ."""
    found = {}
    for name, module in model.named_modules():
        part = own_part(module)
        if part is not None and _as_it_is(part, module, _sizes(name, module)) is None:
            shapes = {key: shape for key, shape in _sizes(name, module).items() if key in part.cuts}
            left = {key: {dim: len(kept) for dim, kept in cut.items()} for key, cut in part.cuts.items()}
            found[name] = f"its tensors have shapes {shapes}, its slimming left these sizes by dimension: {left}"
    return found


def join_parts(parts: Mapping[str, SlimmingPlan]) -> SlimmingPlan:
    """One plan of parts that have no tensor in common, each in the names of its own module."""
    moved = [part.under(name) for name, part in parts.items()]

    def union(field: str) -> dict[str, object]:
        return {name: value for part in moved for name, value in getattr(part, field).items()}

    fields = ("shapes", "cuts", "groups", "selects", "streams", "pinned", "removed", "kept_for", "attributes", "sizes")
    return SlimmingPlan(
        biases=tuple(name for part in moved for name in part.biases),
        **{field: union(field) for field in fields},  # type: ignore[arg-type]
    )


def _remember(network: nn.Module) -> None:
    """Tell every module around slimmed layers of them, so that they are missed when they are replaced."""
    parts = parts_of(network)
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        below = {layer[len(prefix) :]: part for layer, part in parts.items() if layer.startswith(prefix) and layer}
        if below:
            setattr(module, _PARTS, below)


def _sizes(name: str, module: nn.Module, latest: SlimmingPlan | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a module, before the latest plan."""
    cut = latest.shapes if latest is not None else {}
    return {key: cut.get(join(name, key), tuple(tensor.shape)) for key, tensor in tensors_of(module).items()}


def _as_it_is(part: SlimmingPlan, module: nn.Module, sizes: Mapping[str, tuple[int, ...]]) -> SlimmingPlan | None:
    """The part with the shapes that it leaves now; None if it cannot have left these."""
    shapes = {}
    for name, cut in part.cuts.items():
        full = _before(cut, part.shapes[name], sizes.get(name))
        if full is None:
            return None
        shapes[name] = full
    if part.selects and selected(module) is None:
        return None
    return part if shapes == part.shapes else replace(part, shapes=shapes)


def _with_new_bias(part: SlimmingPlan, module: nn.Module, sizes: Mapping[str, tuple[int, ...]]) -> SlimmingPlan:
    """The part of a layer that was given a bias later (fused with its batch norm, say): it has the weight's rows."""
    rows = part.cuts.get("weight", {}).get(0)
    has_rows = isinstance(module, nn.Linear | _ConvNd) and not isinstance(module, _ConvTransposeNd)
    is_ours = bool(part.biases) or "bias" in part.cuts
    if rows is None or is_ours or not has_rows or sizes.get("bias") != (len(rows),):
        return part
    shape = {"bias": (part.shapes["weight"][0],)}
    return replace(part, shapes=part.shapes | shape, cuts=part.cuts | {"bias": {0: rows}})


def _before(
    cut: Mapping[int, tuple[int, ...]], shape: tuple[int, ...], now: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """Shape of a tensor before it was cut; None if its present one does not come from that."""
    if now is None or len(now) != len(shape) or any(now[dim] != len(kept) for dim, kept in cut.items()):
        return None
    return tuple(shape[dim] if dim in cut else size for dim, size in enumerate(now))


def _by_module(network: nn.Module, plan: SlimmingPlan) -> dict[str, SlimmingPlan]:
    """The plan in parts, one for each module that holds tensors of it, in the module's own names."""
    modules = dict(network.named_modules())
    names: dict[str, list[str]] = {}
    for name in plan.cuts:
        names.setdefault(name.rpartition(".")[0], []).append(name)
    owners = dict.fromkeys(
        [
            *names,
            *plan.groups,
            *plan.biases,
            *plan.selects,
            *plan.streams,
            *plan.removed,
            *plan.attributes,
            *plan.sizes,
        ]
    )
    kept_for: dict[str, dict[str, str]] = {}
    for name, reason in plan.kept_for.items():
        owner = module_of_gate(name, modules)
        kept_for.setdefault(owner, {})[name[len(owner) :].lstrip(".")] = reason
    owners |= dict.fromkeys(kept_for)
    return {
        owner: SlimmingPlan(
            {name.rpartition(".")[2]: plan.shapes[name] for name in names.get(owner, ())},
            {name.rpartition(".")[2]: plan.cuts[name] for name in names.get(owner, ())},
            {"": plan.groups[owner]} if owner in plan.groups else {},
            ("",) if owner in plan.biases else (),
            {"": plan.selects[owner]} if owner in plan.selects else {},
            removed={"": plan.removed[owner]} if owner in plan.removed else {},
            streams={"": plan.streams[owner]} if owner in plan.streams else {},
            kept_for=kept_for.get(owner, {}),
            attributes={"": plan.attributes[owner]} if owner in plan.attributes else {},
            sizes={"": plan.sizes[owner]} if owner in plan.sizes else {},
        )
        for owner in owners
    }
