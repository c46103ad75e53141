"""Optimizers follow parameters that have become smaller: their groups, their state, pending gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Move:
    """A parameter that takes another's place.

    Attributes:
        old, new: the parameters.
        cut: what stays of a tensor of the old one's shape.
    """

    old: nn.Parameter
    new: nn.Parameter
    cut: Callable[[Tensor], Tensor]


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
