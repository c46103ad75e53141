"""One network inside a LightningModule: a module that the training step calls as a whole, and the inputs it gets."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_fscreen.costs.latency import compare_latency
from lightning_fscreen.costs.operations import noting_others
from lightning_fscreen.costs.size import Size, measure_size
from lightning_fscreen.costs.timings import Timings
from lightning_fscreen.fit.compiled import is_compiled
from lightning_fscreen.modules import batch_size, evaluating, is_within, same_attributes
from lightning_fscreen.randomness import same_random_numbers
from lightning_fscreen.statistics.collector import examined

log = logging.getLogger(__name__)

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_INSTANCES = 2  # enough for a batch dimension to be told from a size of 1


@dataclass(eq=False)
class Network:
    """A module that the training step calls as a whole.

    Attributes:
        name: its name in the model.
        module: the module.
        inputs: the first ones that it got, cut to a few instances if it can do with these; None if they are not known
            yet.
        dtype: of its parameters then.
        unused: layers with candidates inside it that its call does not use.
        told: modules with operations that nobody can count, of which there was a warning.
    """

    name: str
    module: nn.Module
    inputs: Inputs | None = None
    dtype: torch.dtype = torch.float32
    unused: Collection[str] = ()
    told: set[str] = field(default_factory=set)

    def holds(self, layer: str) -> bool:
        """Whether a layer is a part of it."""
        return is_within(layer, self.name) and layer not in self.unused

    def record(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], whole: bool = False) -> None:
        """Remember inputs, of a few instances, or the whole."""
        instances = batch_size((args, kwargs))

        def cut(tensor: Tensor) -> Tensor:
            if tensor.layout != torch.strided:  # sparse ones have no rows to take
                return tensor.detach().clone()
            first = tensor[:_INSTANCES] if not whole and tensor.ndim and len(tensor) == instances else tensor
            # Without autocast, no layer takes what a layer before has computed under it.
            return first.detach().to(self.dtype if tensor.dtype == lower else tensor.dtype, copy=True)

        parameter = next(self.module.parameters())
        kind = parameter.device.type
        lower = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.dtype = parameter.dtype
        self.inputs = pytree.tree_map_only(Tensor, cut, (tuple(args), dict(kwargs)))

    def record_few(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Remember inputs of a few instances if the network runs on these, else the whole.

        It does not where they name others by numbers: the nodes of a graph, offsets into a text.

        Args:
            model: which holds the network.
            args: the inputs.
            kwargs: keyword inputs.
        """
        self.record(args, kwargs)
        if not self._runs(model):
            self.record(args, kwargs, whole=True)

    def _runs(self, model: nn.Module) -> bool:
        args, kwargs = self.inputs_on_device()
        try:
            with self.examining(model), evaluating(self.module), same_attributes(self.module), torch.no_grad():
                self.module(*args, **kwargs)
        except Exception:  # whatever forward raises
            return False
        return True

    @property
    def instances(self) -> int:
        """Number of instances in the inputs."""
        return batch_size(self.inputs) or 1

    def inputs_on_device(self) -> Inputs:
        """The inputs, as the network would get them now: it may have been moved, or converted to another dtype."""
        parameter = next(self.module.parameters())

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(parameter if tensor.dtype == self.dtype else parameter.device)

        args, kwargs = pytree.tree_map_only(Tensor, move, self.inputs)
        return args, kwargs

    def examining(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Within this context it runs to be looked at; see `examining`."""
        return examining(model, self.inputs)

    def measure(self, model: nn.Module, timings: Timings | None = None) -> Size:
        """Its size; without operations if its inputs are not known, and with its latency if that is asked for."""
        inputs = None if self.inputs is None else self.inputs_on_device()
        with self.examining(model):
            with noting_others() as others:
                size = measure_size(self.module, inputs, self.instances, self.name)
            self._tell(others)
            if timings is None or inputs is None:
                return size
            known = f"{self.name or type(self.module).__name__}, {size.params} parameters, {size.macs} multiply–adds"
            time = timings.of_network(known, lambda: self.times(timings, [self.module])[0])
            return replace(size, latency=round(1e6 * time))

    def _tell(self, uncounted: Mapping[str, Collection[str]]) -> None:
        for module in uncounted.keys() - self.told:
            log.warning(
                "the multiply–adds of %s in %s are not known and not counted, so that a budget of them divides the "
                'others alone; budget="params" or "latency" counts all',
                ", ".join(sorted(uncounted[module])),
                module,
            )
        self.told |= uncounted.keys()

    def times(self, timings: Timings, modules: Sequence[nn.Module]) -> list[float]:
        """Milliseconds of a forward pass of modules that take the same inputs, on the device of some timings.

        Raises:
            ValueError: one cannot run there, or not on so many instances.
        """
        args, kwargs = self.inputs_on_device()
        there = next(self.module.parameters()).device == timings.device
        try:
            moved = modules if there else [copy.deepcopy(module).to(timings.device) for module in modules]
            return compare_latency(moved, args, kwargs, timings.batch_size)
        except Exception as error:  # whatever forward raises
            where = f"with a batch of {timings.batch_size} on {timings.device}"
            raise ValueError(
                f'{self.describe()} cannot be timed {where} ({error}), as budget="latency" needs; give another '
                "batch_size or device in Latency"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Name and inputs; these only if they are tensors and primitives in tuples, lists and dicts, as files need."""
        return {"name": self.name, "inputs": self.inputs if _is_plain(self.inputs) else None, "dtype": self.dtype}

    def describe(self) -> str:
        """Its name in a message."""
        return f"module {self.name!r}" if self.name else f"{type(self.module).__name__}.forward"


@contextlib.contextmanager
def examining(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Within this context a model's networks run to be looked at: as they were written, without logging.

    Args:
        model: the model; `log` of Lightning modules in it does nothing.
        inputs: of the network, for their device.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
    token = examined.set(True)
    modules = [vars(module) for module in model.modules() if isinstance(module, LightningModule)]
    own = [attributes.get("log") for attributes in modules]
    for attributes in modules:
        attributes["log"] = lambda *args, **kwargs: None  # before the method; log_dict calls it, too
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(same_random_numbers())
            stack.enter_context(torch.autocast(tensors[0].device.type if tensors else "cpu", enabled=False))
            if is_compiled(model):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        for attributes, log in zip(modules, own, strict=True):
            attributes["log"] = log
            if log is None:
                del attributes["log"]
        examined.reset(token)


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (Tensor, bool, int, float, str)
