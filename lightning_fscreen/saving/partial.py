"""Load a part of a model file into a network that differs in the rest: a slim backbone under another head."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from lightning_fscreen.modules import join, select
from lightning_fscreen.slimming.plan import PlanError, SlimmingPlan

log = logging.getLogger(__name__)


def left_out(
    network: Mapping[str, Tensor],
    plan: SlimmingPlan,
    saved: Mapping[str, Tensor],
    exclude: str | Sequence[str] | None,
    strict: bool,
) -> dict[str, str]:
    """Tensors that are not loaded, and why; with strict=False also those that only one side has, or of other sizes.

    Args:
        network: persistent tensors of a full-size network, by name.
        plan: the plan that is going to be applied to it.
        saved: tensors of the file.
        exclude: glob patterns over the names of modules.
        strict: whether all others have to fit.

    Raises:
        ValueError: a pattern matches no module.
    """
    names = dict.fromkeys([*network, *saved])
    excluded = select(dict.fromkeys(_owner(name) for name in names), None, exclude)
    reasons = {name: excluded[_owner(name)] for name in names if _owner(name) in excluded}
    if not strict:
        for name in names:
            if name not in saved:
                reasons.setdefault(name, "not in the file")
            elif name not in network and _owner(name) not in plan.biases:
                reasons.setdefault(name, "not in the network")
            elif name in network and (misfit := _misfit(plan, name, network[name], saved[name])):
                reasons.setdefault(name, misfit)
    if reasons:
        listed = "; ".join(f"{name} ({reason})" for name, reason in sorted(reasons.items()))
        log.log(
            logging.INFO if strict else logging.WARNING, "not loaded, left as they are but for their cuts: %s", listed
        )
    return reasons


def without(
    plan: SlimmingPlan, network: nn.Module, tensors: Mapping[str, Tensor], left: Mapping[str, str]
) -> SlimmingPlan:
    """The plan for a network some of whose tensors are not loaded.

    They are cut like the saved ones, since their neighbours are: another head has other classes, but reads the same
    features. One that has only the remaining features already is left as it is.

    Raises:
        PlanError: a tensor that has neither the full size nor the remaining one along a dimension that is cut.
    """
    shapes, cuts = dict(plan.shapes), dict(plan.cuts)
    for name in left:
        if name not in cuts:
            continue
        cut, planned = cuts[name], shapes[name]
        shape = tuple(tensors[name].shape) if name in tensors else ()
        if len(shape) == len(planned) and all(shape[dim] == planned[dim] for dim in cut):
            shapes[name] = shape
        elif len(shape) in (0, len(planned)) and all(shape[dim] == len(kept) for dim, kept in cut.items() if shape):
            del cuts[name], shapes[name]
        else:
            rest = tuple(len(cut.get(dim, range(size))) for dim, size in enumerate(planned))
            raise PlanError(
                f"{name!r} of shape {shape} is left out, but has to fit what was slimmed beside it: the saved one had "
                f"shape {planned}, of which {rest} is left; give it one of these sizes along dimensions {[*cut]}"
            )
    modules = {name for name, _ in network.named_modules()}
    return replace(
        plan,
        shapes=shapes,
        cuts=cuts,
        biases=tuple(name for name in plan.biases if name in modules and join(name, "bias") not in left),
        **{
            field: {name: value for name, value in getattr(plan, field).items() if name in modules}
            for field in ("groups", "selects", "streams", "removed")
        },
    )


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _misfit(plan: SlimmingPlan, name: str, tensor: Tensor, saved: Tensor) -> str | None:
    shape = list(tensor.shape)
    for dim, kept in plan.cuts.get(name, {}).items():
        if dim < len(shape):
            shape[dim] = len(kept)
    found = tuple(saved.shape)
    return None if tuple(shape) == found else f"shape {found} in the file, {tuple(shape)} here"
