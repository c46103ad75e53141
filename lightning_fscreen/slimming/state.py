"""The plan travels in the state_dict of a slim network, and whoever loads one takes its size first.

The hooks are functions of this module, so that copies and pickles of a network keep them.
"""

# ruff: noqa: SLF001  # torch gives no public list of hooks

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fscreen.modules import join
from lightning_fscreen.slimming.carried import attach_plan, join_parts, parts_of, plan_of
from lightning_fscreen.slimming.plan import PlanError, SlimmingPlan
from lightning_fscreen.slimming.resize import grow, slim_like
from lightning_fscreen.slimming.select import put_select, selected

_OLD_KEY = "fscreen_plan"
PLAN_KEY = (
    f"{_OLD_KEY}: this network was slimmed, load it with load_from_checkpoint or load_slimmed from lightning_fscreen"
)
"""Key of a state_dict: the JSON text of the plan, (bytes,) uint8.

A network that knows nothing of plans lists it as unexpected, in the first line of its error: so it says what to do.
torch splits keys at dots, so it has none.
"""
_TEXT = "_fscreen_text"


def attach(network: nn.Module, plan: SlimmingPlan) -> None:
    """Remember how a network was slimmed, and let its plan travel with it from now on."""
    attach_plan(network, plan)
    carry(network)


def carry(network: nn.Module) -> None:
    """Let the smallest part with all slimmed layers, and its own parts with some, hold the plan in their state_dicts.

    It takes the size of what is loaded into it, and so does the network. Parts beside which other layers were slimmed,
    too, do not: they alone would no longer fit the others.
    """
    layers = list(parts_of(network))
    if not layers:
        return
    modules = dict(network.named_modules())
    # A single layer needs no plan, its tensors have the sizes.
    paths = [name.split(".") if modules[name]._modules else name.split(".")[:-1] for name in layers]
    same = itertools.takewhile(lambda steps: len(set(steps)) == 1, zip(*paths, strict=False))
    whole = ".".join(steps[0] for steps in same)
    for name, module in modules.items():
        inside = name == whole or name.startswith(f"{whole}." if whole else "")
        if inside and name != whole:
            inside = bool(module._modules) and any(f"{layer}.".startswith(f"{name}.") for layer in layers)
        if inside and _save not in module._state_dict_hooks.values():
            module.register_state_dict_post_hook(_save)
        if (inside or not name) and not _loading(module):
            module.register_load_state_dict_pre_hook(_load if len(name) <= len(whole) else _load_part)


def resize_on_load(model: nn.Module) -> Callable[[], None]:
    """Let a model take the size of the state_dicts that are loaded into it.

    Returns:
        A function that ends this, unless the model is slim by then and has to go on.
    """
    listens = any(getattr(hook, "hook", hook) is _load for hook in model._load_state_dict_pre_hooks.values())
    handle = None if listens else model.register_load_state_dict_pre_hook(_load)

    def stop() -> None:
        if handle is not None:
            handle.remove()
        carry(model)

    return stop


def take_plan(
    state_dict: MutableMapping[str, Any], network: nn.Module, prefix: str = ""
) -> tuple[SlimmingPlan, list[str]] | None:
    """Take the plans of everything below a prefix out of a state_dict.

    Args:
        state_dict: of a network like this one.
        network: a module that it has under two names (`self.backbone = self.net.body`) is in the plan under the first.
        prefix: its place in the state_dict.

    Returns:
        One plan, and the modules whose plans it holds; None if there were none.

    Raises:
        PlanError: damaged plans, or two of one tensor.
    """
    keys = [key for key in state_dict if key.startswith(prefix) and _is_plan(key)]
    if not keys:
        return None
    plans: dict[str, SlimmingPlan] = {}
    for key in keys:
        name = key[len(prefix) :].rpartition(".")[0]
        if name in plans:
            raise PlanError(f"the state_dict has two slimming plans of {name!r}; remove one of {keys}")
        plans[name] = _decode(key, state_dict.pop(key))
    total = join_parts(plans)
    if len(total.cuts) < sum(len(plan.cuts) for plan in plans.values()):
        raise PlanError(f"the state_dict has several slimming plans of the same layers; remove one of {keys}")
    first = _first_names(network)
    own = total.renamed(first)
    if any(own.cuts[first(name)] != cut for name, cut in total.cuts.items()):
        raise PlanError(f"the state_dict has different slimming plans of the same layers; remove one of {keys}")
    return replace(own, biases=tuple(dict.fromkeys(own.biases))), list(dict.fromkeys(map(first, plans)))


def _first_names(network: nn.Module) -> Callable[[str], str]:
    """Name of a module in the network, or of anything in it → the same with the first name of that module."""
    first = {module: name for name, module in network.named_modules()}
    others = {name: first[module] for name, module in network.named_modules(remove_duplicate=False)}
    others = {name: own for name, own in others.items() if name != own}

    def rename(name: str) -> str:
        parts = name.split(".") if others else []
        for length in range(len(parts), 0, -1):
            if (start := ".".join(parts[:length])) in others:
                return ".".join([others[start], *parts[length:]])
        return name

    return rename


def _is_plan(key: str) -> bool:
    return key.rpartition(".")[2].startswith(_OLD_KEY)


class _Text:
    """The JSON text of a module's plan, kept as long as its parts are the same; copies of the module begin without."""

    def __init__(self) -> None:
        self._parts: dict[str, SlimmingPlan] = {}
        self._text = ""

    def __reduce__(self) -> tuple[type[_Text], tuple[()]]:
        return _Text, ()

    def of(self, module: nn.Module) -> str:
        parts = parts_of(module)
        if list(map(id, parts.values())) != list(map(id, self._parts.values())) or list(parts) != list(self._parts):
            plan = join_parts(parts)
            self._parts, self._text = parts, plan.to_json() if plan else ""
        return self._text


def _save(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    own = itertools.takewhile(lambda key: key.startswith(prefix), reversed(state_dict))  # written last
    for key in [key for key in own if _is_plan(key)]:
        del state_dict[key]  # of a part; this one has it all
    if text := module.__dict__.setdefault(_TEXT, _Text()).of(module):
        state_dict[prefix + PLAN_KEY] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before anything is loaded: be as large as what will be.

    Raises:
        PlanError: the plan is damaged or does not fit; the model is as it was then.
    """
    saved, own = take_plan(state_dict, module, prefix), plan_of(module)
    if saved is not None:
        plan, slimmed = saved
        _check_sizes(plan, state_dict, prefix)
        if plan.is_like(own):
            _refresh_selects(module, plan, state_dict, prefix)
            return
        undo = grow(module)
        try:
            slim_like(module, plan)
        except PlanError:
            undo()
            raise
        _drop_hooks(module)
        for name, part in module.named_modules():
            if name in slimmed:
                carry(part)
        carry(module)
    elif own and _is_full_size(own, state_dict, prefix):
        grow(module)
        _drop_hooks(module)


def _refresh_selects(module: nn.Module, plan: SlimmingPlan, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Selects have their indices again, where a network was on the meta device meanwhile: they are not saved."""
    for name, indices in plan.selects.items():
        norm = module.get_submodule(name)
        present = selected(norm)
        if present is not None:
            saved = next((value for key, value in state_dict.items() if key.startswith(f"{prefix}{name}.")), present)
            device = saved.device if present.is_meta else present.device
            put_select(norm, indices, device)


def _load_part(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Likewise, for a part whose size cannot change alone.

    Raises:
        PlanError: the state_dict is that of a part of another size.
    """
    saved = take_plan(state_dict, module, prefix)
    if saved is not None and not saved[0].is_like(plan_of(module)):
        raise PlanError(
            f"the state_dict holds a {type(module).__name__} that was slimmed in another way than this one, whose "
            "neighbours would no longer fit; load it into a fresh one, or the whole network into the whole"
        )


def _loading(module: nn.Module) -> list[int]:
    hooks = module._load_state_dict_pre_hooks.items()
    return [key for key, hook in hooks if getattr(hook, "hook", hook) in (_load, _load_part)]


def _drop_hooks(module: nn.Module) -> None:
    """Remove the hooks of a network that is no longer slim; it goes on listening, but its parts do not."""
    for part in module.modules():
        for key in [key for key, hook in part._state_dict_hooks.items() if hook is _save]:
            del part._state_dict_hooks[key]
        for key in _loading(part) if part is not module else ():  # it is running just now
            del part._load_state_dict_pre_hooks[key]
        part.__dict__.pop(_TEXT, None)


def _decode(key: str, saved: Any) -> SlimmingPlan:
    try:
        # Somebody may have averaged or converted all values of several state_dicts.
        codes = saved.detach().cpu().double().round().to(torch.int64).flatten().tolist()
        text = bytes(codes).decode()
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise PlanError(f"{key!r} in the state_dict is no slimming plan: {error}") from error
    return SlimmingPlan.from_json(text)


def _check_sizes(plan: SlimmingPlan, state_dict: Mapping[str, Any], prefix: str) -> None:
    for name, cut in plan.cuts.items():
        tensor = state_dict.get(prefix + name)
        expected = [len(cut[dim]) if dim in cut else size for dim, size in enumerate(plan.shapes.get(name, ()))]
        if isinstance(tensor, Tensor) and list(tensor.shape) != expected:
            raise PlanError(
                f"the state_dict holds {join(prefix.rstrip('.'), name)!r} of shape {tuple(tensor.shape)}, its slimming "
                f"plan says {tuple(expected)}; it was changed after it was saved, or put together from several"
            )


def _is_full_size(plan: SlimmingPlan, state_dict: Mapping[str, Any], prefix: str) -> bool:
    """Whether the tensors that the plan cuts have their size before it."""
    present = [(state_dict[prefix + name], shape) for name, shape in plan.shapes.items() if prefix + name in state_dict]
    return bool(present) and all(tuple(tensor.shape) == shape for tensor, shape in present)
