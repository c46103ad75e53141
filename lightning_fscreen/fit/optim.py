"""The order of an optimizer's parameters, to which the state in a checkpoint belongs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.optim import Optimizer


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
