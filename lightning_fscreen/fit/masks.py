"""Keep pruned weights at exact zero, whatever the optimizer does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_fscreen.members import Members
from lightning_fscreen.slimming import SlimmingPlan

# Where value, gradient and state are zero, these leave a zero, whatever their options: it need not be written again.
_FIXED_AT_ZERO = (optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RMSprop, optim.Adagrad)


class Masks:
    """Boolean masks over the candidates, True where a value is kept, and their enforcement on the parameters.

    Pruned values are set to zero when they are pruned, their optimizer state with them and their gradients before every
    step, so that the others are updated as if the pruned ones did not exist, clipping by norm included. After the step
    of an optimizer that might move them nevertheless (of another kind, or with gradients that nobody has masked) they
    are set to zero again.

    Args:
        members: layer → the parameters whose entries belong to its candidates, at the size that they have now.
        kept: layer → mask at full size; all are kept by default.
        held: whether pruned values stay at zero.
        plan: all slimmings of the parameters so far.
        names: layer → name of its parameter in the plan; by default the layer's own.

    Attributes:
        members: the parameters.
        held: whether pruned values stay at zero; otherwise they were zeroed once, and can grow again.
        present: layer → mask at the size that the layer has now, False for what is held at zero. Where
            slimming has put a constant into the place of a pruned value, it is True.

    Raises:
        ValueError: masks that do not fit the layers.
    """

    def __init__(
        self,
        members: Mapping[str, Members],
        kept: Mapping[str, Tensor] | None = None,
        held: bool = True,
        plan: SlimmingPlan | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.members = dict(members)
        self._plan = plan or SlimmingPlan()
        self._names = dict(names or {name: name for name in members})
        self.held = held
        if kept is None:
            self._kept = {name: _all_kept(own) for name, own in members.items()}
        else:
            self._kept = {name: m.to(members[name].weight.device) if name in members else m for name, m in kept.items()}
        self._num_kept = num_true(self._kept)
        present = {name: self._kept[name] for name in members}
        if kept is not None:
            present = {name: self._cut(name, mask) for name, mask in present.items()}
        self._check(present)
        if not held:
            present = {name: torch.ones_like(mask) for name, mask in present.items()}
        elif self._plan:
            present = {name: mask | members[name].nonzero() for name, mask in present.items()}
        self.present = present
        # Where something is pruned: the parameter and its mask in its dtype; multiplying by that is several times
        # faster than filling by a boolean one.
        self._factors: list[tuple[Tensor, Tensor]] = []
        self._handles: list[RemovableHandle] = []
        self._gradients_masked = False  # since the last step
        self._enforce(())

    @property
    def kept(self) -> dict[str, Tensor]:
        """Layer → mask at full size, also after slimming; pruned values that are not held count until they grow."""
        if self.held:
            return self._kept
        grown = {name: self._full_size(name, own.nonzero()) for name, own in self.members.items()}
        return {name: mask | grown[name] if name in grown else mask for name, mask in self._kept.items()}

    @property
    def total(self) -> int:
        """Number of candidates, at full size."""
        return sum(mask.numel() for mask in self._kept.values())

    @property
    def num_pruned(self) -> int:
        """How many of them are pruned."""
        return self.total - sum(self.num_kept.values())

    @property
    def num_dead(self) -> dict[str, int]:
        """Number of kept candidates, by layer, that slimming took along: they led nowhere, or came from nowhere."""
        left = num_true({name: self._cut(name, self._kept[name]) for name in self.members})
        return {name: count - left[name] if name in left else 0 for name, count in self._num_kept.items()}

    @property
    def num_kept(self) -> dict[str, int]:
        """Layer → number of candidates that are kept."""
        return self._num_kept if self.held else num_true(self.kept)

    def set(self, present: Mapping[str, Tensor], optimizers: Iterable[Optimizer] = ()) -> None:
        """Replace the masks, and zero the pruned values and their state in these optimizers.

        Args:
            present: layer → mask at the size that the layer has now.
            optimizers: the optimizers.

        Raises:
            ValueError: masks that do not fit the layers; nothing is changed then.
        """
        self._check(present)
        self.held = True
        self.present = self._copied(present)
        self._record(self.present)
        self._enforce(optimizers)

    @torch.no_grad()
    def zero_once(self, present: Mapping[str, Tensor]) -> None:
        """Replace the masks, and zero the pruned values, without companions and state; they can grow again."""
        self._check(present)
        self.held = False
        self._record(self._copied(present))
        self.present = {name: _all_kept(own) for name, own in self.members.items()}
        self._factors = []
        for name, own in self.members.items():
            own.weight.mul_(own.spread(present[name]).to(own.weight))

    def forget_removed(self) -> None:
        """Count what is physically gone, by another callback's slimming, as pruned."""
        for name, present in self.present.items():
            nothing = torch.zeros_like(self._kept[name])
            self._kept[name] = self._kept[name] & self._full_size(name, torch.ones_like(present), nothing)
        self._num_kept = num_true(self._kept)

    def fit(self, masks: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether masks are of the size that the layers have in a network with these parameters, by name."""
        found = {name: parameters.get(self._names.get(name, "")) for name in masks}
        return all(p is not None and self.members[n].of(p).shape == masks[n].shape for n, p in found.items())

    def _check(self, present: Mapping[str, Tensor]) -> None:
        for name, own in self.members.items():
            if name not in present or present[name].shape != own.shape:
                found = f"shape {tuple(present[name].shape)}" if name in present else "no mask"
                raise ValueError(
                    f"layer {name!r} has candidates of shape {tuple(own.shape)}, but {found}; if weights were "
                    "loaded in the fit, of the network before it was slimmed, take those of epochs after it"
                )

    def _copied(self, present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        devices = {name: own.weight.device for name, own in self.members.items()}
        return {name: present[name].to(device, torch.bool, copy=True) for name, device in devices.items()}

    def _cut(self, name: str, full: Tensor) -> Tensor:
        """The part of a tensor over all candidates of a layer that is physically left."""
        return self.members[name].cut(full, partial(self._plan.cut, self._names[name]))

    def _record(self, present: Mapping[str, Tensor]) -> None:
        self._kept |= {name: self._full_size(name, mask) for name, mask in present.items()}
        self._num_kept = num_true(self._kept)

    def _full_size(self, name: str, present: Tensor, full: Tensor | None = None) -> Tensor:
        """A mask at full size: these values where candidates are left; elsewhere those of `full`, or `kept`."""
        full = self._kept[name] if full is None else full
        if full.shape == present.shape:
            return present
        places = torch.arange(full.numel(), device=full.device).view(full.shape)
        places = self._cut(name, places)
        return full.flatten().index_copy(0, places.flatten(), present.flatten()).view(full.shape)

    @torch.no_grad()
    def _enforce(self, optimizers: Iterable[Optimizer]) -> None:
        pruned = {name: mask for name, mask in self.present.items() if not bool(mask.all())}
        masked = [both for name, mask in pruned.items() for both in self.members[name].masks(mask)]
        self._factors = [(parameter, mask.to(parameter.dtype)) for parameter, mask in masked]
        self.apply()
        for optimizer in optimizers:
            for parameter, mask in masked:  # one may have the rows of some candidates and the columns of others
                _mask_state(optimizer.state.get(parameter, {}), parameter.shape, mask)

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
        """Keep pruned values at zero, in these optimizers' state and through all their steps, until `unwatch`."""
        optimizers = list(optimizers)
        self._enforce(optimizers)

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if not self._gradients_masked or type(optimizer) not in _FIXED_AT_ZERO:
                self.apply()
            self._gradients_masked = False

        self._handles += [optimizer.register_step_post_hook(after_step) for optimizer in optimizers]

    def unwatch(self) -> None:
        """Remove the optimizer hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def num_true(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of True in each of these masks."""
    return {name: int(mask.count_nonzero()) for name, mask in masks.items()}  # on CPUs ten times as fast as a sum


def _multiply_(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Multiply the first of each pair by the second, in place."""
    if pairs and pairs[0][0].is_cpu:  # where one call for all of them is a loop, too, and a slower one
        for tensor, factor in pairs:
            tensor.mul_(factor)
    elif pairs:
        torch._foreach_mul_([tensor for tensor, _ in pairs], [factor for _, factor in pairs])


def _mask_state(state: Mapping[str, Any], shape: torch.Size, kept: Tensor) -> None:
    for value in state.values():
        if isinstance(value, Tensor) and value.shape == shape:
            value.mul_(kept)


def _all_kept(members: Members) -> Tensor:
    return torch.ones(members.shape, dtype=torch.bool, device=members.weight.device)
