"""Optimizers follow parameters that have become smaller: their groups, their state, pending gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_fscreen.modules import join
from lightning_fscreen.slimming.plan import SlimmingPlan

log = logging.getLogger(__name__)

_ADVICE = "use an optimizer with element-wise state (SGD, Adam, AdamW, RMSprop) or slim=False"


@dataclass(frozen=True)
class Move:
    """A parameter that takes another's place.

    Attributes:
        old, new: the parameters.
        cut: gives the part of a tensor of the old one's shape that remains.
    """

    old: nn.Parameter
    new: nn.Parameter
    cut: Callable[[Tensor], Tensor]

    def carry(self, values: Tensor) -> Tensor:
        """What remains of a tensor of the old shape, with the new one's strides: fused steps go by memory order."""
        new, cut = self.new, self.cut(values)
        if cut.stride() == new.stride() and cut is not values:
            return cut
        return torch.empty_strided(new.shape, new.stride(), dtype=values.dtype, device=values.device).copy_(cut)


def unwrapped(optimizers: Any) -> list[Optimizer]:
    """The optimizers of one or of a sequence, with those that they wrap (Lightning's and Lookahead's, for example).

    Raises:
        TypeError: something is no optimizer.
    """
    if isinstance(optimizers, Optimizer) or not isinstance(optimizers, Iterable):
        optimizers = [optimizers]
    found: dict[int, Optimizer] = {}
    for optimizer in optimizers:
        own = {id(inner): inner for inner in _inside(optimizer)}
        if not own:
            raise TypeError(f"optimizers has a {type(optimizer).__name__}, which is no torch.optim.Optimizer")
        found |= own
    return list(found.values())


def _inside(value: Any) -> Iterator[Optimizer]:
    for inner in getattr(value, "__dict__", {}).values():
        if isinstance(inner, Optimizer):
            yield from _inside(inner)
    if isinstance(value, Optimizer):
        yield value


def optimizers_of(model: nn.Module, optimizers: Any) -> list[Optimizer]:
    """The optimizers, unwrapped, of a model that is going to be smaller.

    Raises:
        TypeError: something is no optimizer.
        ValueError: none of them has a parameter of the model.
        NotImplementedError: one that cannot be cut with its parameters.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    used = unwrapped(optimizers)
    if used and not any(_holds(optimizer, names) for optimizer in used):
        raise ValueError(
            f"optimizers: none of {[type(optimizer).__name__ for optimizer in used]} has a parameter of this "
            f"{type(model).__name__}; it was made for another model, or before slim replaced the parameters: make it "
            "anew from model.parameters()"
        )
    check_optimizers(used)
    check_state(used, names)
    return used


def check_optimizers(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers that shard their parameters or their state.

    Raises:
        NotImplementedError: names the optimizer, or the kind of parameter, and what to use instead.
    """
    for optimizer in optimizers:
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
            raise NotImplementedError(
                "pruning does not support ZeroRedundancyOptimizer, whose state is spread over the processes; use the "
                "optimizer that it wraps"
            )
        for group in optimizer.param_groups:
            if any(type(parameter.data).__name__ == "DTensor" for parameter in group["params"]):
                raise NotImplementedError(
                    "pruning does not support DTensor parameters, which are spread over devices; use "
                    "Trainer(strategy='auto') on one device or strategy='ddp' on several, with ordinary parameters"
                )


def check_state(optimizers: Iterable[Optimizer], names: Mapping[Tensor, str]) -> None:
    """Refuse optimizers whose state cannot be cut with the parameters.

    Args:
        optimizers: the optimizers.
        names: parameters that may become smaller, by name.

    Raises:
        NotImplementedError: state of another shape than its parameter (factored optimizers), in lists, or for all
            parameters at once (LBFGS); names optimizer, state and parameter.
    """
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        if isinstance(optimizer, LBFGS) and any(
            p in names for group in optimizer.param_groups for p in group["params"]
        ):
            raise NotImplementedError(f"{kind} keeps one state for all parameters, which cannot be cut; {_ADVICE}")
        for parameter, state in optimizer.state.items():
            for key, value in state.items() if parameter in names else ():
                name, shape = names[parameter], tuple(parameter.shape)
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    raise NotImplementedError(
                        f"{kind} keeps {key!r} of shape {tuple(value.shape)} for {name!r} of shape {shape}, which "
                        f"cannot be cut with it; {_ADVICE}"
                    )
                if _holds_tensors(value):
                    raise NotImplementedError(
                        f"{kind} keeps {key!r}, a {type(value).__name__} of tensors, for {name!r} of shape {shape}, "
                        f"which cannot be cut with it; {_ADVICE}"
                    )


def _holds(optimizer: Optimizer, names: Mapping[Tensor, str]) -> bool:
    return any(parameter in names for group in optimizer.param_groups for parameter in group["params"])


def _holds_tensors(value: Any) -> bool:
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(isinstance(item, Tensor) or _holds_tensors(item) for item in values)


def follow_plan(
    optimizers: Iterable[Optimizer], model: nn.Module, before: dict[str, nn.Parameter], plan: SlimmingPlan
) -> list[str]:
    """Let optimizers, and pending gradients, follow a model that a plan has made smaller.

    Args:
        optimizers: those that passed `check_state`.
        model: the model.
        before: its parameters by name before it became smaller; those that have been replaced are taken out.
        plan: the plan, with names as in the model.

    Returns:
        The names of those that have been replaced.
    """
    after = dict(model.named_parameters())
    replaced = [name for name, old in before.items() if after[name] is not old]
    moves = (
        Move(before.pop(name), after[name], lambda tensor, name=name: plan.cut(name, tensor))  # type: ignore[misc]
        for name in replaced
    )
    weights = {layer: model.get_submodule(layer).get_parameter("weight") for layer in plan.biases}
    move_parameters(optimizers, moves, {after[join(layer, "bias")]: weight for layer, weight in weights.items()})
    return replaced


def move_parameters(
    optimizers: Iterable[Optimizer], moves: Iterable[Move], added: Mapping[nn.Parameter, nn.Parameter] | None = None
) -> None:
    """Put new parameters in the places of old ones, with the state and the gradients that stay.

    Groups, schedulers and the optimizer objects stay the same. One parameter follows the other, the smallest first, and
    the memory of those that nobody else holds is free for the next.

    Args:
        optimizers: the optimizers.
        moves: which parameter takes whose place.
        added: parameters that had none before → a new parameter whose group they join.
    """
    waiting = sorted(moves, key=lambda move: move.old.numel(), reverse=True)
    new_of: dict[Tensor, nn.Parameter] = {move.old: move.new for move in waiting}
    optimizers = list(optimizers)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["params"][:] = [new_of.get(parameter, parameter) for parameter in group["params"]]
        for new, beside in (added or {}).items():
            _join(group, new, beside)
    new_of.clear()
    while waiting:
        move = waiting.pop()
        old, new = move.old, move.new
        if old.grad is not None:
            new.grad = move.carry(old.grad)
            old.grad = None  # whoever still has the old parameter: room for the next one
        for optimizer in optimizers:
            if old in optimizer.state:
                optimizer.state[new] = {
                    key: move.carry(value)
                    if isinstance(value, Tensor) and value.shape == old.shape and value.ndim
                    else value
                    for key, value in optimizer.state.pop(old).items()
                }
        del move, old


def _join(group: dict[str, Any], new: nn.Parameter, beside: nn.Parameter) -> None:
    """Add a parameter to a group that holds `beside`, unless it is there already (groups can be shared by wrappers)."""
    places = [index for index, parameter in enumerate(group["params"]) if parameter is beside]
    if places and all(parameter is not new for parameter in group["params"]):
        group["params"].append(new)
        if "param_names" in group:
            group["param_names"].append(join(group["param_names"][places[0]].rpartition(".")[0], "bias"))


def awaiting(parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of the parameters with a hook that waits for their gradient."""
    return {name for name, each in parameters.items() if getattr(each, "_post_accumulate_grad_hooks", None)}


def warn_of_orphans(
    optimizers: Iterable[Optimizer], model: nn.Module, replaced: Iterable[str], awaited: Collection[str]
) -> None:
    """Warn if parameters that were in training are gone, and none of the optimizers has their successors.

    A gradient, which the successor has by now, or a hook that waits for one, is all that a parameter knows of an
    optimizer.

    Args:
        optimizers: those that followed.
        model: the model.
        replaced: names of the parameters that are gone.
        awaited: names of those with such a hook.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    gone = {name: parameter for name in replaced if id(parameter := model.get_parameter(name)) not in held}
    trained = [name for name, parameter in gone.items() if parameter.grad is not None or name in awaited]
    if trained:
        log.warning(
            "%d parameters that were in training have been replaced by smaller ones (%r is the first), and no "
            "optimizer knows it: one that was made before goes on with the old ones, without an error. Pass it to "
            "slim, optimizers=[optimizer], or make it anew",
            len(trained),
            trained[0],
        )
