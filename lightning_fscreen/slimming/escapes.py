"""Tensors that leave a network by other ways than its output: attributes that forward sets, hooks of the user's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_fscreen.modules import OWN_ATTRIBUTES, same_attributes

Found = list[tuple[str, Tensor]]
"""Why tensors are outputs, too, and the tensors."""


@contextlib.contextmanager
def returning_escapes(network: nn.Module, reasons: list[str] | None = None) -> Iterator[None]:
    """Inside, such tensors of a call are returned behind its outputs: whoever has them may need all of their channels.

    These are tensors that forward has put into attributes of modules (features for another loss, attention maps, what
    a recurrent part remembers), and what forward hooks see that are none of torch's or ours. Attributes are as before.

    Args:
        network: the network.
        reasons: is filled with one for each of them, in their order, at every call.
    """
    own, forward = vars(network).get("forward"), network.forward

    @functools.wraps(forward)
    def returning(*args: Any, **kwargs: Any) -> Any:
        found: Found = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(same_attributes(network))
            before = _held(network)
            for hook in _watch(network, found):
                stack.callback(hook)
            outputs = forward(*args, **kwargs)
            found += _held(network)
        known = {id(tensor) for _, tensor in before} | {id(leaf) for leaf in pytree.tree_leaves(outputs)}
        found = [(why, tensor) for why, tensor in found if id(tensor) not in known]
        if reasons is not None:
            reasons[:] = [why for why, _ in found]
        return (outputs, [tensor for _, tensor in found]) if found else outputs

    network.forward = returning
    try:
        yield
    finally:
        if own is None:
            del network.forward
        else:
            network.forward = own


def _held(network: nn.Module) -> Found:
    """Tensors in attributes of modules, also in lists, tuples and dicts there."""
    held: Found = []
    for name, module in network.named_modules():
        for attribute, value in vars(module).items():
            if attribute in OWN_ATTRIBUTES or not isinstance(value, Tensor | list | tuple | dict):
                continue
            where = f"attribute {attribute!r}{f' of module {name!r}' if name else ''}"
            held += [
                (f"forward keeps it in {where}", leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)
            ]
    return held


def _watch(network: nn.Module, found: Found) -> Iterator[Callable[[], None]]:
    """Look at what the user's hooks see; gives functions that end that."""
    for name, module in network.named_modules():
        if module is network:
            continue
        why = f"a forward hook of module {name!r} reads it"

        def note(values: Any, why: str = why) -> None:
            found.extend((why, leaf) for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))

        if any(map(_is_foreign, module._forward_pre_hooks.values())):  # noqa: SLF001  # torch has no public list
            yield module.register_forward_pre_hook(lambda _, args, note=note: note(args)).remove
        if any(map(_is_foreign, module._forward_hooks.values())):  # noqa: SLF001
            yield module.register_forward_hook(lambda _, args, output, note=note: note(output)).remove


def _is_foreign(hook: Any) -> bool:
    """Whether a hook is neither torch's, Lightning's nor ours: these need no channels."""
    function = hook.func if isinstance(hook, functools.partial) else hook
    home = getattr(function, "__module__", None) or type(function).__module__
    return home.split(".")[0] not in ("torch", "lightning", "pytorch_lightning", "lightning_fscreen")
