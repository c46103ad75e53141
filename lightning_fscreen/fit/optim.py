"""Optimizers follow parameters that have become smaller: their groups, their state, pending gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer


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


def check_optimizers(trainer: Trainer) -> None:
    """Refuse optimizers that shard their parameters or their state.

    Raises:
        NotImplementedError: names the optimizer, or the kind of parameter, and what to use instead.
    """
    for optimizer in trainer.optimizers:
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
            raise NotImplementedError(
                "ScreeningPruningCallback does not support ZeroRedundancyOptimizer, whose state is spread over the "
                "processes; use the optimizer that it wraps"
            )
        for group in optimizer.param_groups:
            if any(type(parameter.data).__name__ == "DTensor" for parameter in group["params"]):
                raise NotImplementedError(
                    "ScreeningPruningCallback does not support DTensor parameters, which are spread over devices; use "
                    "Trainer(strategy='auto') on one device or strategy='ddp' on several, with ordinary parameters"
                )


def order_of(optimizers: Iterable[Optimizer], model: nn.Module) -> list[list[list[str]]]:
    """Names of the parameters in every group of every optimizer; empty for those that are not in the model."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[[names.get(p, "") for p in group["params"]] for group in opt.param_groups] for opt in optimizers]


def restore_order(optimizers: Iterable[Optimizer], model: nn.Module, order: Sequence[Sequence[Sequence[str]]]) -> None:
    """Arrange the parameters in the groups as they were, for the state that belongs to them by position.

    Slimming can add a bias to a layer; a fresh optimizer has it in another place. Optimizers of other parameters or
    another number of groups are left alone.
    """
    parameters = dict(model.named_parameters())
    for optimizer, now, before in zip(optimizers, order_of(optimizers, model), order, strict=False):
        flat, wanted = ([name for group in groups for name in group] for groups in (now, before))
        if len(now) == len(before) and sorted(flat) == sorted(wanted) and "" not in wanted:
            for group, names in zip(optimizer.param_groups, before, strict=True):
                group["params"][:] = [parameters[name] for name in names]


def check_state(optimizers: Iterable[Optimizer], names: Mapping[Tensor, str]) -> None:
    """Refuse optimizers whose state cannot be cut with the parameters.

    Args:
        optimizers: the optimizers.
        names: parameters that may become smaller, by name.

    Raises:
        NotImplementedError: state of another shape than its parameter (factored optimizers); names both.
    """
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if parameter in names and isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    raise NotImplementedError(
                        f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for "
                        f"{names[parameter]!r} of shape {tuple(parameter.shape)}, which cannot be cut with it; "
                        "use an optimizer with element-wise state (SGD, Adam, AdamW, RMSprop) or slim=False"
                    )


def move_parameters(
    optimizers: Iterable[Optimizer], moves: Sequence[Move], added: Mapping[nn.Parameter, nn.Parameter] | None = None
) -> None:
    """Put new parameters in the places of old ones, with the state and the gradients that stay.

    Groups, schedulers and the optimizer objects stay the same.

    Args:
        optimizers: the optimizers.
        moves: which parameter takes whose place.
        added: parameters that had none before → a new parameter whose group they join.
    """
    by_old: dict[Tensor, Move] = {move.old: move for move in moves}
    for move in moves:
        if move.old.grad is not None:
            move.new.grad = move.cut(move.old.grad)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            parameters = [by_old[p].new if p in by_old else p for p in group["params"]]
            parameters += [new for new, beside in (added or {}).items() if any(beside is p for p in parameters)]
            group["params"][:] = parameters
        for old in [parameter for parameter in optimizer.state if parameter in by_old]:
            move = by_old[old]
            state = optimizer.state.pop(old)
            optimizer.state[move.new] = {
                key: move.cut(value) if isinstance(value, Tensor) and value.shape == old.shape and value.ndim else value
                for key, value in state.items()
            }
