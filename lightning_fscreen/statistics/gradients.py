"""Sums of gradients over the steps of an epoch, for criteria that rank by the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class GradientStatistics:
    """Statistics of the candidates of one layer over the gathered steps.

    Attributes:
        gradient: mean |∂L/∂w|, of the weight's shape.
        taylor: mean |Σ w·∂L/∂w| over the parameters that are pruned with the candidate.
    """

    gradient: Tensor
    taylor: Tensor


class GradientSums:
    """Running sums over optimizer steps; gradients of processes that train together are averaged before they arrive.

    Args:
        parameters: layer → the weight (or scale), and the parameters that are pruned with it, of the same shape.
    """

    def __init__(self, parameters: Mapping[str, Sequence[nn.Parameter]]) -> None:
        self._parameters = {name: list(group) for name, group in parameters.items()}
        dtypes = {name: torch.promote_types(group[0].dtype, torch.float32) for name, group in parameters.items()}
        self._gradient = {
            name: torch.zeros_like(group[0], dtype=dtypes[name]) for name, group in self._parameters.items()
        }
        self._taylor = {name: torch.zeros_like(zeros) for name, zeros in self._gradient.items()}
        self._steps = dict.fromkeys(self._parameters, 0)

    @torch.no_grad()
    def add(self, optimizer: Optimizer, scale: Tensor | None = None) -> None:
        """Add the gradients that an optimizer is about to use. Where they overflowed (it will not), they are zeros.

        Args:
            optimizer: the optimizer.
            scale: by which factor its gradients are larger than those of the loss; None for 1.
        """
        used = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for name, group in self._parameters.items():
            if group[0].grad is None or group[0] not in used:
                continue
            gradient = self._gradient[name]
            products = torch.zeros_like(gradient)
            for parameter in group:
                if parameter.grad is not None:
                    products += parameter * _finite(parameter.grad, gradient.dtype, scale)
            gradient += _finite(group[0].grad, gradient.dtype, scale).abs_()
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
