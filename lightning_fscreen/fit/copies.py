"""Copies of the network in a fit: which modules are one, and which of them follow it when it is pruned."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from lightning_fscreen.modules import join, named_tensors
from lightning_fscreen.slimming.copies import Copy, average_exactly, is_copy, signature, take_pruned
from lightning_fscreen.slimming.plan import SlimmingPlan
from lightning_fscreen.slimming.state import resize_on_load

log = logging.getLogger(__name__)

_SAMPLE = 8  # values of every parameter that tell whether it has changed


@dataclass(frozen=True)
class Found:
    """A module that could be a copy of a part of the model.

    Attributes:
        name: its name, in the model or after the name of the callback that holds it.
        module: the module.
        original: name, in the model, of what it is a copy of; "" for the whole model.
        averages: whether it stands in a wrapper that averages weights.
        inside: whether it is a part of the model.
    """

    name: str
    module: nn.Module
    original: str
    averages: bool
    inside: bool


class Copies:
    """Copies of a model, or of parts of it, that are not trained: in itself and in the Trainer's callbacks.

    Those in wrappers that average (`AveragedModel`, timm's `ModelEmaV3`) follow the model when it is pruned, and others
    if their parameters have changed since the fit began, as a mean teacher's have. One that stands still, a fixed
    teacher, stays as it is. A copy has no candidates of its own.

    Args:
        trainer: the trainer.
        model: the model.
        samples: name of a copy → some of its values when the fit began, as `samples` gave them before a checkpoint.

    Attributes:
        samples: the same.
        candidates: layers of the model that are pruned: what holds one is a part of the network, and no copy, however
            much it looks like another part (an auxiliary head that no loss reaches).
    """

    candidates: Collection[str] = ()

    def __init__(self, trainer: Trainer, model: LightningModule, samples: Mapping[str, Tensor]) -> None:
        self._trainer, self._model = trainer, model
        self.samples = dict(samples)
        self._announced: dict[str, bool] = {}
        for name, part in _twins(model):
            self.samples.setdefault(name, _sample(part))
        self.refresh()

    def refresh(self) -> None:
        """Look for copies again: callbacks make them when they like."""
        self._found = list(_find(self._trainer, self._model))
        for found in self._found:
            self.samples.setdefault(found.name, _sample(found.module))
        self.average_exactly()

    def average_exactly(self) -> None:
        """See `slimming.copies.average_exactly`."""
        for outer in (self._model, *_held(self._trainer, self._model).values()):
            average_exactly(outer)

    @property
    def _copies(self) -> list[Found]:
        def pruned(found: Found) -> bool:
            return found.inside and any(_relative(layer, found.name) is not None for layer in self.candidates)

        return [found for found in self._found if not pruned(found)]

    @property
    def outside(self) -> list[nn.Module]:
        """Modules that callbacks hold, and that are copies of the model or of parts of it."""
        return held_copies(self._trainer, self._model)

    def reasons(self, layers: Sequence[str]) -> dict[str, str]:
        """Layers of the model that are in a copy, and why they have no candidates."""
        inside = [found for found in self._copies if found.inside]
        return {
            layer: f"part of {found.name!r}, a copy of {found.original!r} that is not trained itself"
            for found in inside
            for layer in layers
            if layer == found.name or layer.startswith(f"{found.name}.")
        }

    def following(self, network: str) -> list[Copy]:
        """The copies that follow, of a network in the model or of parts of it.

        Args:
            network: its name in the model.
        """
        copies = []
        for found in self._copies:
            part = _relative(found.original, network)
            within = _relative(network, found.original)
            if part is None and within is None:
                continue  # of something else
            follows = found.averages or not torch.equal(_sample(found.module), self.samples[found.name])
            if self._announced.get(found.name) != follows:
                self._announced[found.name] = follows
                fate = "follows it" if follows else "has not changed since the fit began: it stays as it is"
                log.info("%r, a copy of %r, %s", found.name, found.original or type(self._model).__name__, fate)
            if follows:
                module = found.module if part is not None else found.module.get_submodule(within or "")
                copies.append(Copy(found.name, module, part or ""))
        return copies

    def take_pruned(self, network: str, pruned: Mapping[str, Tensor]) -> None:
        """Give the copies that follow the network's own values where it is pruned.

        Args:
            network: its name in the model.
            pruned: parameter of the model → mask of its shape, True where it is pruned.
        """
        own = {part: mask for name, mask in pruned.items() if (part := _relative(name, network)) is not None}
        take_pruned(self.following(network), self._model.get_submodule(network), own)

    @torch.no_grad()
    def begin_again(self) -> None:
        """Give the copies that follow the model's own values, after it has been put back to others."""
        for copy in self.following(""):
            own = named_tensors(self._model.get_submodule(copy.part))
            for name, tensor in named_tensors(copy.module).items():
                tensor.copy_(own[name])

    def plans(self, network: str, plan: SlimmingPlan) -> SlimmingPlan:
        """What a plan for a network, with names as in it, does to the whole model: to the network and its copies."""
        modules = {id(module): name for name, module in self._model.named_modules()}
        total = plan.under(network)
        for copy in self.following(network):
            if (name := modules.get(id(copy.module))) is not None:
                total = total.then(plan.within(copy.part).under(name))
        return total


def _relative(name: str, network: str) -> str | None:
    """A name in a model as one in its submodule `network`; None if it is not in there."""
    inside = not network or name == network or name.startswith(f"{network}.")
    return name[len(network) :].removeprefix(".") if inside else None


def _find(trainer: Trainer, model: LightningModule) -> Iterator[Found]:
    trained = _trained(trainer)
    parts = [(name, part) for name, part in model.named_modules() if any(True for _ in part.parameters())]
    averaged = [name for name, _ in parts if name and _averages(model, name)]
    originals = [
        (name, part)
        for name, part in parts
        if any(id(p) in trained for p in part.parameters())
        and all(_relative(name, average) is None for average in averaged)
    ]
    inner: list[Found] = []
    for name, part in parts:
        if any(_relative(name, found.name) is not None for found in inner):
            continue  # a part of a copy
        averages = name in averaged
        if not averages and (
            any(id(p) in trained for p in part.parameters()) or not any(True for _ in part.children())
        ):
            continue  # a layer without parts is no network
        for original, module in originals:
            if is_copy(part, module):
                inner.append(Found(name, part, original, averages, inside=True))
                break
    yield from inner
    for holder, outer in _held(trainer, model).items():
        for name, part, original in _outermost(outer, [("", model), *originals]):
            label = join(holder, name)
            yield Found(label, part, original, _averages(outer, name), inside=False)
            for found in inner:  # the copies in a copy of what holds them
                if (rest := _relative(found.name, original)) is not None:
                    copy = part.get_submodule(rest)
                    yield Found(join(label, rest), copy, found.original, found.averages, inside=False)


def _trained(trainer: Trainer) -> set[int]:
    """Identities of the parameters that are trained.

    Optimizers also hold what `self.parameters()` gave them and no loss reaches: it has no gradient, and no state.
    """
    held = {
        p: p.grad is not None or bool(optimizer.state.get(p))
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad
    }
    stepped = any(held.values())
    return {id(p) for p, reached in held.items() if reached or not stepped}


def _twins(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules with parts of which there is another one of the same class, with the same tensors."""
    parts = [(name, part) for name, part in model.named_modules() if name and any(True for _ in part.children())]
    parts = [(name, part) for name, part in parts if any(True for _ in part.parameters())]
    kinds = {name: (type(part), signature(part)) for name, part in parts}
    counts = Counter(kinds.values())
    done: list[str] = []
    for name, part in parts:
        if counts[kinds[name]] > 1 and all(_relative(name, other) is None for other in done):
            done.append(name)
            yield name, part


def held_copies(trainer: Trainer, model: nn.Module) -> list[nn.Module]:
    """Copies of a model, or of parts of it, that callbacks hold."""
    parts = [(name, part) for name, part in model.named_modules() if any(True for _ in part.children())]
    return [copy for outer in _held(trainer, model).values() for _, copy, _ in _outermost(outer, parts)]


def resize_held_copies(trainer: Trainer, model: nn.Module) -> RemovableHandle:
    """Let copies that callbacks hold take the size of what is loaded into them, which happens after the model's own."""

    def prepare(*_: Any) -> None:
        for copy in held_copies(trainer, model):
            resize_on_load(copy)

    handle: RemovableHandle = model.register_load_state_dict_pre_hook(prepare)
    return handle


def _outermost(outer: nn.Module, originals: Sequence[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module, str]]:
    """The outermost modules inside one that are copies of others: name, module, name of the original."""
    done: list[str] = []
    for name, part in outer.named_modules():
        if any(_relative(name, other) is not None for other in done):
            continue
        original = next((own for own, module in originals if is_copy(part, module)), None)
        if original is not None:
            done.append(name)
            yield name, part, original


def _averages(outer: nn.Module, name: str) -> bool:
    """Whether a submodule stands in a wrapper that averages the weights of others into it."""
    wrapper, _, own = name.rpartition(".")
    parent = outer.get_submodule(wrapper)
    updates: Callable[..., object] | None = getattr(parent, "update", None)
    return own == "module" and (isinstance(parent, AveragedModel) or (callable(updates) and hasattr(parent, "decay")))


def _held(trainer: Trainer, model: nn.Module) -> dict[str, nn.Module]:
    """Modules beside a model that the callbacks hold, or the model itself where torch does not see them."""
    own = {id(module) for module in model.modules()}
    found: dict[str, nn.Module] = {}
    for owner in (*trainer.callbacks, model):  # type: ignore[attr-defined]
        for attribute, value in vars(owner).items():
            for place, item in enumerate(value if isinstance(value, list | tuple) else (value,)):
                if isinstance(item, nn.Module) and all(id(module) not in own for module in item.modules()):
                    found[f"{type(owner).__name__}.{attribute}{f'[{place}]' if item is not value else ''}"] = item
    return found


def _sample(module: nn.Module) -> Tensor:
    values = [parameter.detach().flatten()[:_SAMPLE].cpu().double() for parameter in module.parameters()]
    return torch.cat(values)
