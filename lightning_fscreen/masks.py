"""Keep pruned weights at exact zero, whatever the optimizer does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

# Where value, gradient and state are zero, these leave a zero, whatever their options: it need not be written again.
_FIXED_AT_ZERO = (optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RMSprop, optim.Adagrad)


class Masks:
    """Boolean masks over parameters, True where a value is kept, and their enforcement.

    Pruned values are set to zero when they are pruned, their optimizer state with them and their gradients before every
    step, so that the others are updated as if the pruned ones did not exist, clipping by norm included. After the step
    of an optimizer that might move them nevertheless (of another kind, or with gradients that nobody has masked) they
    are set to zero again.

    Args:
        parameters: name → parameter.
        companions: name → a parameter of the same shape that is pruned with it, and not counted.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], companions: Mapping[str, nn.Parameter] | None = None
    ) -> None:
        self._parameters = dict(parameters)
        self._companions = dict(companions or {})
        self.kept = {name: torch.ones_like(p, dtype=torch.bool) for name, p in self._parameters.items()}
        self.num_kept = {name: p.numel() for name, p in self._parameters.items()}
        """Candidates left, by layer."""
        # Where something is pruned: the parameter and its mask in its dtype; multiplying by that is several times
        # faster than filling by a boolean one.
        self._factors: list[tuple[Tensor, Tensor]] = []
        self._handles: list[RemovableHandle] = []
        self._gradients_masked = False  # since the last step

    @property
    def _masked(self) -> list[tuple[str, nn.Parameter]]:
        return [*self._parameters.items(), *self._companions.items()]

    @property
    def total(self) -> int:
        """Number of candidates."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    @property
    def total_kept(self) -> int:
        """Number of candidates left."""
        return sum(self.num_kept.values())

    @torch.no_grad()
    def set(self, kept: Mapping[str, Tensor], optimizers: Iterable[Optimizer] = ()) -> None:
        """Replace the masks, and zero what they prune: weights, and state of these optimizers.

        Raises:
            ValueError: masks that do not fit the parameters; nothing is changed then.
        """
        for name, parameter in self._parameters.items():
            if name not in kept or kept[name].shape != parameter.shape:
                found = f"shape {tuple(kept[name].shape)}" if name in kept else "no mask"
                raise ValueError(f"layer {name!r} has a weight of shape {tuple(parameter.shape)}, but {found}")
        self.kept = {name: kept[name].to(p.device, torch.bool, copy=True) for name, p in self._parameters.items()}
        self.num_kept = {name: int(mask.sum()) for name, mask in self.kept.items()}
        self._factors = [
            (parameter, self.kept[name].to(parameter.dtype))
            for name, parameter in self._masked
            if self.num_kept[name] < parameter.numel()
        ]
        self.apply()
        by_parameter: dict[Tensor, Tensor] = {parameter: self.kept[name] for name, parameter in self._masked}
        for optimizer in optimizers:
            for tensor, state in optimizer.state.items():
                if tensor in by_parameter:
                    _mask_state(state, by_parameter[tensor])

    @torch.no_grad()
    def zero_once(self, kept: Mapping[str, Tensor]) -> None:
        """Zero what these masks prune, without companions and state, and let it grow again."""
        for name, parameter in self._parameters.items():
            parameter.mul_(kept[name].to(parameter))

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the pruned weights."""
        _multiply_(self._factors)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the gradients of the pruned weights."""
        _multiply_([(gradient, factor) for weight, factor in self._factors if (gradient := weight.grad) is not None])
        self._gradients_masked = True

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Keep the pruned weights at zero through every step of these optimizers, until `unwatch`."""

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if not self._gradients_masked or type(optimizer) not in _FIXED_AT_ZERO:
                self.apply()
            self._gradients_masked = False

        self._handles += [optimizer.register_step_post_hook(after_step) for optimizer in optimizers]

    def unwatch(self) -> None:
        """Take the optimizer hooks away again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _multiply_(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Multiply the first of each pair by the second, in place."""
    if pairs and pairs[0][0].is_cpu:  # where one call for all of them is a loop, too, and a slower one
        for tensor, factor in pairs:
            tensor.mul_(factor)
    elif pairs:
        torch._foreach_mul_([tensor for tensor, _ in pairs], [factor for _, factor in pairs])


def _mask_state(state: Mapping[str, Any], kept: Tensor) -> None:
    for value in state.values():
        if isinstance(value, Tensor) and value.shape == kept.shape:
            value.mul_(kept)
