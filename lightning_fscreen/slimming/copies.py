"""Copies of a network whose values follow it (moving averages, mean teachers) become smaller with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_fscreen.modules import join, named_tensors, parameters_by_name, put_tensor
from lightning_fscreen.slimming.double import Tensors
from lightning_fscreen.slimming.plan import SlimmingPlan
from lightning_fscreen.slimming.rewrite import Undo, install, overwrite
from lightning_fscreen.slimming.select import selected
from lightning_fscreen.slimming.state import attach
from lightning_fscreen.slimming.verify import VerificationError


@dataclass(frozen=True)
class Copy:
    """A module with the same tensors as a network, or as a part of it, but with values of its own.

    Attributes:
        name: how it is called in messages.
        module: the copy.
        part: name, in the network, of the submodule that it is a copy of; "" for the whole network.
    """

    name: str
    module: nn.Module
    part: str = ""

    @property
    def values(self) -> dict[str, Tensor]:
        """Its tensors, by the names that they have in the network."""
        return {join(self.part, name): tensor for name, tensor in named_tensors(self.module).items()}

    @contextlib.contextmanager
    def worn_by(self, network: nn.Module) -> Iterator[None]:
        """Within this context the network has the copy's values: what is found out then is true of the copy."""
        places, values = parameters_by_name(network), self.values
        if elsewhere := [name for name in values if name not in places]:
            raise VerificationError(
                f"{self.name} cannot become smaller with {type(network).__name__}: {elsewhere[0]!r} is shared with a "
                "part of it that was not copied"
            )
        old = [(module, attribute, getattr(module, attribute)) for name in values for module, attribute in places[name]]
        for name, value in values.items():
            own = getattr(*places[name][0])
            worn: Tensor = value.detach().to(own.device)
            if isinstance(own, nn.Parameter):
                worn = nn.Parameter(worn, own.requires_grad)
            for module, attribute in places[name]:
                put_tensor(module, attribute, worn)
        try:
            yield
        finally:
            for module, attribute, tensor in old:
                put_tensor(module, attribute, tensor)

    def has(self, name: str) -> bool:
        """Whether a tensor of the network is one of the copy's, too."""
        return not self.part or name.startswith(f"{self.part}.")

    def install(self, plan: SlimmingPlan, tensors: Tensors) -> Undo:
        """Make it as small as the network, by a plan and new tensors with names as in the network."""
        own = {name.removeprefix(f"{self.part}."): name for name in tensors if self.has(name)}
        makers = {name: partial(tensors.__getitem__, full) for name, full in own.items()}
        return install(self.module, plan.within(self.part), Tensors(makers))

    def attach(self, plan: SlimmingPlan) -> None:
        """Remember a plan that has been carried out."""
        attach(self.module, plan.within(self.part))


def is_copy(module: nn.Module, network: nn.Module) -> bool:
    """Whether a module could be a copy of a network: the same class, and tensors of the same names and shapes."""
    return module is not network and type(module) is type(network) and signature(module) == signature(network)


def signature(module: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of a module's tensors."""
    return tuple((name, tuple(tensor.shape)) for name, tensor in named_tensors(module).items())


def copies_of(network: nn.Module, follow: Sequence[nn.Module]) -> list[Copy]:
    """The copies of a network in modules that follow it: themselves, or inside, as in `AveragedModel`.

    Raises:
        ValueError: a module that has no copy of the network, or one that shares tensors with it.
    """
    found: list[Copy] = []
    for place, module in enumerate(follow):
        inside = [(name, part) for name, part in module.named_modules() if is_copy(part, network)]
        own = [Copy(f"follow[{place}]{name and f' ({name})'}", part) for name, part in inside]
        if not own:
            raise ValueError(
                f"follow[{place}], a {type(module).__name__}, holds no copy of the {type(network).__name__}: no module "
                "of this class whose parameters and buffers have the same names and shapes"
            )
        found += [copy for copy in own if all(copy.module is not other.module for other in found)]
    tensors = {id(tensor) for tensor in named_tensors(network).values()}
    for copy in found:
        shared = [name for name, tensor in named_tensors(copy.module).items() if id(tensor) in tensors]
        if shared:
            raise ValueError(f"{copy.name} shares {shared[0]!r} with the network; a copy has values of its own")
    return found


def take_pruned(copies: Sequence[Copy], network: nn.Module, pruned: Mapping[str, Tensor]) -> Undo:
    """Give the copies the network's own values where it is pruned: there is nothing left to average.

    An average of a weight that has become zero would take long to be zero, and copy and network could not lose the
    same channels.

    Args:
        copies: the copies.
        network: the network.
        pruned: parameter of the network → mask of its shape, True where it is pruned.

    Returns:
        A function that undoes it.
    """
    own = dict(network.named_parameters())
    steps = []
    for copy in copies:
        values = copy.values
        steps += [overwrite(values[name], pruned[name], own[name]) for name in values.keys() & pruned.keys()]

    def undo() -> None:
        for step in reversed(steps):
            step()

    return undo


def average_exactly(model: nn.Module) -> None:
    """Let every `AveragedModel` inside average integers in float64, and round them.

    With `use_buffers=True` it also averages the indices by which slim networks select channels, in float32, and drops
    what follows the point: 0.999 · 5 + 0.001 · 5 can become 4.
    """
    for module in model.modules():
        if not isinstance(module, AveragedModel) or not module.use_buffers:
            continue
        if all(selected(part) is None for part in module.modules()):
            continue
        if module.avg_fn is not None and not isinstance(module.avg_fn, _Rounding):
            module.avg_fn = _Rounding(module.avg_fn)
        if module.multi_avg_fn is not None and not isinstance(module.multi_avg_fn, _RoundingAll):
            module.multi_avg_fn = _RoundingAll(module.multi_avg_fn)


@dataclass(frozen=True)
class _Rounding:
    average: Callable[[Tensor, Tensor, Tensor | int], Tensor]

    def __call__(self, averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        if averaged.is_floating_point() or averaged.is_complex():
            return self.average(averaged, current, count)
        return self.average(averaged.double(), current.double(), count).round().to(averaged.dtype)


@dataclass(frozen=True)
class _RoundingAll:
    average: Callable[..., None]

    def __call__(self, averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        if averaged[0].is_floating_point() or averaged[0].is_complex():
            self.average(averaged, current, count)
            return
        exact = [tensor.double() for tensor in averaged]
        self.average(exact, [tensor.double() for tensor in current], count)
        for tensor, value in zip(averaged, exact, strict=True):
            tensor.copy_(value.round())
