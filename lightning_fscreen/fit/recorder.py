"""Finds the networks inside a LightningModule: the modules that its training step calls as a whole."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_fscreen.fit.networks import Network
from lightning_fscreen.modules import is_within, named_tensors, uncompiled
from lightning_fscreen.statistics.collector import trains

OnCall = Callable[[Network], Any]
_NOT_CALLED = "no module that holds it is called as a whole in training_step"


def common_parent(model: nn.Module, names: Sequence[str]) -> str:
    """Name of the smallest submodule that holds all modules of these names; "" (`model` itself) if there is none."""
    paths = [name.split(".") for name in names]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    name = ".".join(shared)
    module = model.get_submodule(name)
    while name and type(module).forward is nn.Module.forward:  # ModuleList and the like are never called
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
    return name


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module's class."""
    return types.MethodType(type(module).forward, module)


class _Observed:
    """Stands in for the forward of a module; copies of the module, and pickled ones, have their own forward instead.

    Args:
        module: the module.
        forward: its forward.
        call: what is called.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any], call: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)  # for those who ask for its signature
        self._module, self._call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[nn.Module]]:
        return own_forward, (self._module,)


class Recorder:
    """Finds the networks of a model: the outermost modules with candidates that are called, each as a whole.

    A module that holds another one that is also called by itself is no network: what it passes to that one is seen from
    outside, so the modules that it calls are tried instead. So are those of a module that the caller rejects.

    Args:
        model: the model.
        names: its layers with candidates.
        innermost: of nested modules with the same candidates, prefer the inner one.

    Attributes:
        networks: those found, by name, in the order of their first calls.
        left_out: modules that are no networks, and why.
        closed: no more networks are looked for.
        optimizers: of the training; modules none of whose parameters they have are no networks.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], innermost: bool = False) -> None:
        self._model, self._names, self._innermost = model, list(names), innermost
        self.optimizers: Sequence[Optimizer] = ()
        self.networks: dict[str, Network] = {}
        self.left_out: dict[str, str] = {}
        self.closed = False
        self._complete = False
        self._untrained: set[str] = set()
        self._divided: set[str] = set()  # left out because of modules inside, which says nothing of the others there
        self._running: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._observed: Callable[..., Any] | None = None  # the model's forward, while it is watched

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with the networks of a state; in earlier versions there was one, and none before it was called."""
        single = [{**state, "name": state["network"]}] if state.get("inputs") is not None else []
        for known in state.get("networks", single):
            name = known["name"]
            self.networks[name] = Network(name, self._model.get_submodule(name), known["inputs"], known["dtype"])

    # ---- what is known

    @property
    def is_ready(self) -> bool:
        """Whether networks and their inputs are known."""
        return bool(self.networks) and all(network.inputs is not None for network in self.networks.values())

    @property
    def is_complete(self) -> bool:
        """Whether nothing more is to be found."""
        if not self._complete:  # asked for in every step
            self._complete = self.is_ready and (self.closed or not self.unreached)
        return self._complete

    @property
    def awaits_others(self) -> bool:
        """Whether a module that was not called yet may be one more network."""
        return not self.closed and _NOT_CALLED in self.unreached.values()

    @property
    def unreached(self) -> dict[str, str]:
        """Layers with candidates that no network holds, and why."""
        reasons = {}
        for name in self._names:
            if not any(network.holds(name) for network in self.networks.values()):
                reasons[name] = _NOT_CALLED
                if any(is_within(name, network) for network in self.networks):
                    reasons[name] = "the training step does not use it"
                for module, reason in self.left_out.items():
                    if is_within(name, module) and module not in self._divided:
                        reasons[name] = reason
        return reasons

    @property
    def parent(self) -> str:
        """Name of the smallest module that holds all candidates; one layer is no network."""
        name = common_parent(self._model, self._names)
        return name.rpartition(".")[0] if name in self._names else name

    @property
    def parent_network(self) -> Network:
        """That module, which may be a network."""
        return Network(self.parent, self._model.get_submodule(self.parent))

    def describe(self) -> str:
        """That module, in a message."""
        return self.parent_network.describe()

    def has_inside(self, name: str) -> bool:
        """Whether a module holds others that may be networks."""
        return any(inner != name and is_within(inner, name) for inner in self._holders())

    def complain(self) -> NoReturn:
        """Raise that there is no network.

        Raises:
            ValueError: names what was called, and a way out.
        """
        tried = "".join(f"; {reason}" for reason in self.left_out.values())
        raise ValueError(
            f"{self.describe()} was not called in training_step, nor a module inside it that holds layers to prune, so "
            "it is not known how they are connected; call the module that holds them as a whole, self.net(x), or leave "
            f"out those that are not called so by include={tried}"
        )

    def is_untrained(self, name: str) -> bool:
        """Whether a module is known to be part of one without parameters in an optimizer."""
        return any(is_within(name, outer) for outer in self._untrained)

    # ---- watching

    def start(self, on_call: OnCall = lambda network: None) -> None:
        """From now on, call `on_call` before a network that has just been found runs."""
        if self._handles:
            return
        holders = self._holders()
        if "" in holders:
            self._observe_forward(on_call)
        for name, module in holders.items():
            self._watch(name, module, on_call)

    def _watch(self, name: str, module: nn.Module, on_call: OnCall) -> None:
        def enter(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if called is module:  # and no copy of it, which has its hooks
                self._enter(on_call, name, module, args, kwargs)

        def leave(called: nn.Module, args: Any, output: Any) -> None:
            if called is module:
                self._leave(name)

        self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        self._handles.append(module.register_forward_hook(leave, always_call=True))

    def stop(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._running.clear()
        if self._observed is not None and vars(self._model).get("forward") is self._observed:
            del self._model.forward
        self._observed = None

    def _observe_forward(self, on_call: OnCall) -> None:
        """See a training step that calls self.forward(x), which runs no hooks, as if it called self(x)."""
        model, forward = self._model, self._model.forward
        if vars(model).get("forward", own_forward(model)) != own_forward(model):  # somebody else's
            return

        def observed(*args: Any, **kwargs: Any) -> Any:
            if self._running:  # of self(x)
                return forward(*args, **kwargs)
            self._enter(on_call, "", model, args, kwargs)
            try:
                return forward(*args, **kwargs)
            finally:
                self._leave("")

        model.forward = self._observed = _Observed(model, forward, observed)

    def _holders(self) -> dict[str, nn.Module]:
        """Modules around the candidates; without those of torch.compile."""
        around = {
            ".".join(parts[:length])
            for name in self._names
            for parts in [name.split(".")]
            for length in range(len(parts))
        }
        modules = {name: self._model.get_submodule(name) for name in sorted(around)}
        return {name: module for name, module in modules.items() if uncompiled(module) is module}

    def _enter(
        self, on_call: OnCall, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        # Lightning lets DistributedDataParallel call training_step through a replaced forward.
        own = vars(module).get("forward")
        if name in self.left_out or (own is not None and own is not self._observed) or not trains():
            return
        if self._innermost and self._running and self._holds_all(name, self._running[0]):
            outer = self._running[0]
            self.reject(outer, f"{name!r} inside it holds the same layers", divided=True)
            self._running.clear()
        if not self._running:
            self._called(on_call, name, module, args, kwargs)
        if name not in self.left_out:
            self._running.append(name)

    def _leave(self, name: str) -> None:
        if self._running and self._running[-1] == name:
            self._running.pop()

    def _holds_all(self, inner: str, outer: str) -> bool:
        return inner != outer and all(is_within(name, inner) for name in self._names if is_within(name, outer))

    def _called(
        self, on_call: OnCall, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        network = self.networks.get(name)
        if network is None:
            if self.closed or not self._is_separate(name, module):
                return
            network = Network(name, module)
        elif network.inputs is not None:
            return
        network.record_few(self._model, args, kwargs)
        self.networks[name] = network
        on_call(network)

    def _is_separate(self, name: str, module: nn.Module) -> bool:
        """Whether a module that is called is a network; those that are none because of it are rejected."""
        own = Network(name, module).describe()
        trained = {p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        if trained and trained.isdisjoint(module.parameters()):
            self._untrained.add(name)
            self.left_out[name] = f"none of the parameters of {own} is in an optimizer"
            return False
        tensors = set(named_tensors(module).values())
        for other in list(self.networks.values()):
            shared = tensors.intersection(named_tensors(other.module).values())
            inside, around = is_within(name, other.name), is_within(other.name, name)
            if shared and not around:
                self.reject(
                    other.name,
                    f"{own} is part of {other.describe()}, and called by itself as well"
                    if inside
                    else f"{other.describe()} shares parameters with {own}",
                    divided=inside,
                )
            if shared and not inside:
                self._divided |= {name} if around else set()
                self.left_out[name] = (
                    f"{own} shares parameters with {other.describe()}, which is called by itself as well"
                )
        return name not in self.left_out

    def reject(self, name: str, reason: str, divided: bool = False) -> None:
        """Look for networks inside a module instead; `divided` if that is because of one of them."""
        self._complete = False
        self._divided |= {name} if divided else set()
        self.networks.pop(name, None)
        self.left_out[name] = reason
