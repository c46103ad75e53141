"""Tensors that leave a network by another way than its output: in attributes that forward sets."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_fscreen.modules import OWN_ATTRIBUTES, replaced_forward, same_attributes


@contextlib.contextmanager
def returning_escapes(
    network: nn.Module, reasons: list[str] | None = None, only: Collection[str] | None = None
) -> Iterator[None]:
    """Inside, such tensors of a call are returned behind its outputs: whoever has them may need all of their channels.

    These are tensors that forward has put into attributes of modules: features for another loss, attention maps, what a
    recurrent part remembers. Attributes are as before afterwards.

    Args:
        network: the network.
        reasons: is filled with one for each of them, in their order, at every call.
        only: those with these reasons; all by default.
    """
    forward = network.forward

    @functools.wraps(forward)
    def returning(*args: Any, **kwargs: Any) -> Any:
        with same_attributes(network):
            before = _held(network)
            outputs = forward(*args, **kwargs)
            found = _held(network)
        known = {id(tensor) for _, tensor in before} | {id(leaf) for leaf in pytree.tree_leaves(outputs)}
        found = [(why, own) for why, own in found if id(own) not in known and (only is None or why in only)]
        if reasons is not None:
            reasons[:] = [why for why, _ in found]
        return (outputs, [tensor for _, tensor in found]) if found else outputs

    with replaced_forward(network, returning):
        yield


def _held(network: nn.Module) -> list[tuple[str, Tensor]]:
    """Tensors in attributes of modules, also in lists, tuples and dicts there, and why they are outputs then."""
    held: list[tuple[str, Tensor]] = []
    for name, module in network.named_modules():
        for attribute, value in vars(module).items():
            if attribute in OWN_ATTRIBUTES or not isinstance(value, Tensor | list | tuple | dict):
                continue
            where = f"attribute {attribute!r}{f' of module {name!r}' if name else ''}"
            held += [
                (f"forward keeps it in {where}", leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)
            ]
    return held
