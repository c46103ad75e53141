"""Sums of gradients over the steps of an epoch, for criteria that rank by the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_fscreen.members import Members


@dataclass(frozen=True)
class GradientStatistics:
    """Statistics of the candidates of one layer over the gathered steps.

    Attributes:
        gradient: mean |∂L/∂w|; of a candidate with several entries of the weight, mean √(Σ (∂L/∂w)²).
        taylor: mean |Σ w·∂L/∂w| over all entries that belong to the candidate.
    """

    gradient: Tensor
    taylor: Tensor


class GradientSums:
    """Running sums over optimizer steps; gradients of processes that train together are averaged before they arrive.

    Args:
        members: layer → the parameters whose entries belong to its candidates.
    """

    def __init__(self, members: Mapping[str, Members]) -> None:
        self._members = dict(members)
        self._gradient = {name: _zeros(own) for name, own in members.items()}
        self._taylor = {name: torch.zeros_like(zeros) for name, zeros in self._gradient.items()}
        self._steps = dict.fromkeys(members, 0)

    @torch.no_grad()
    def add(self, optimizer: Optimizer, scale: Tensor | None = None) -> None:
        """Add the gradients that an optimizer is about to use. Where they overflowed (it will not), they are zeros.

        Args:
            optimizer: the optimizer.
            scale: by which factor its gradients are larger than those of the loss; None for 1.
        """
        used = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for name, own in self._members.items():
            if own.weight.grad is None or own.weight not in used:
                continue
            gradient = _finite(own.weight.grad, self._gradient[name].dtype, scale)
            products = own.total(own.weight * gradient)
            for other in own.others:
                if other.grad is not None:
                    products += other * _finite(other.grad, gradient.dtype, scale)
            self._gradient[name] += own.norm(gradient)
            self._taylor[name] += products.abs_()
            self._steps[name] += 1

    def statistics(self) -> dict[str, GradientStatistics]:
        """Means over the steps, by layer: those that had gradients.

        Raises:
            ValueError: no layer had any.
        """
        if self._steps and not any(self._steps.values()):
            raise ValueError(
                f"none of the layers {list(self._steps)} had a gradient in any step, so they cannot be ranked by "
                "gradients; are they part of the loss?"
            )
        return {
            name: GradientStatistics(self._gradient[name] / steps, self._taylor[name] / steps)
            for name, steps in self._steps.items()
            if steps
        }

    def state_dict(self) -> dict[str, Any]:
        """The sums, as tensors and primitives."""
        return {"gradient": dict(self._gradient), "taylor": dict(self._taylor), "steps": dict(self._steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        for own, loaded in ((self._gradient, state["gradient"]), (self._taylor, state["taylor"])):
            for name, values in own.items():
                values.copy_(loaded[name])
        self._steps = dict(state["steps"])


def _finite(gradient: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    finite = gradient.to(dtype, copy=True).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return finite if scale is None else finite.div_(scale)


def _zeros(members: Members) -> Tensor:
    weight = members.weight
    return torch.zeros(members.shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
