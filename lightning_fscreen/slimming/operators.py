"""The operators that slimming knows, and how to add one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch import nn

from lightning_fscreen.slimming import (
    attention,
    averages,
    elementwise,
    layers,
    normalising,
    parts,
    pooling,
    repeating,
    replacing,
    shapes,
)
from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.heads import find_heads, mute
from lightning_fscreen.slimming.inputs import find_inputs
from lightning_fscreen.slimming.interpreter import Handler, Off, Walk, operator_name
from lightning_fscreen.slimming.slots import SlotGraph

HANDLERS: dict[str, Handler] = {
    **elementwise.HANDLERS,
    **replacing.HANDLERS,
    **shapes.HANDLERS,
    **repeating.HANDLERS,
    **parts.HANDLERS,
    **pooling.HANDLERS,
    **layers.HANDLERS,
    **normalising.HANDLERS,
    **attention.HANDLERS,
    **averages.HANDLERS,
}
"""Operator → handler; operators of torch by their own name, others as `namespace::name`."""


def find_slots(
    network: nn.Module, captured: Capture, off: Mapping[str, Off] | None = None, literal: Collection[str] = ()
) -> SlotGraph:
    """Walk over a captured network; see `Walk`. Heads that are switched off are not read."""
    if "head_dims" not in captured.memory:
        captured.memory["head_dims"] = _head_dims(network, captured)
    walk = Walk(network, captured, HANDLERS, off, literal, captured.memory["head_dims"])
    slots = walk.run()
    slots.heads = find_heads(slots, walk.modules)
    if (off or {}).keys() - slots.heads.keys() - walk.modules.keys():
        slots.heads |= find_inputs(slots)
    mute(slots, {name: own.pruned for name, own in (off or {}).items() if name in slots.heads})
    return slots


def _head_dims(network: nn.Module, captured: Capture) -> dict[str, int]:
    """What a first walk finds out of heads, where activations are multiplied with each other."""
    if not any(operator_name(node) in attention.HANDLERS for node in captured.graph.nodes):
        return {}
    walk = Walk(network, captured, HANDLERS, {}, head_dims=None)
    slots = walk.run()
    return walk.heads.found(slots) if walk.heads.products else {}


def register_operator(name: str) -> Callable[[Handler], Handler]:
    """Decorator that tells slimming how channels pass through an operator that it does not know.

    Without it, all channels that reach the operator stay. The handler gets the running `Walk` and the call, a node of
    the captured graph. It returns the `Value` of the output: the shape, and for each element the slot (which unit or
    channel it belongs to) and, where it is the same for every input, the constant. It raises `Unsupported`, before it
    changes anything, where it cannot tell; any other exception is an error of the handler. For an operator that
    computes every element by itself there is a handler already, `pointwise`. Every slimming is verified, so that a
    wrong handler leads to a `VerificationError`, not to a wrong network.

    Args:
        name: the operator with its namespace, all overloads: `"mine::gate"`, or `"aten::sinc"` for one of torch.

    Raises:
        ValueError: no namespace, or an operator that has a handler.

    Example:
        >>> import torch
        >>> from torch import Tensor, nn
        >>> from lightning_fscreen import register_operator, slim
        >>> from lightning_fscreen.slimming import Unsupported, Value, pointwise
        >>> @torch.library.custom_op("example::cube", mutates_args=())
        ... def cube(x: Tensor) -> Tensor:
        ...     return x**3
        >>> @torch.library.custom_op("example::mirror", mutates_args=())
        ... def mirror(x: Tensor) -> Tensor:
        ...     return x.flip(-1)
        >>> _ = cube.register_fake(torch.empty_like), mirror.register_fake(torch.empty_like)

        >>> _ = register_operator("example::cube")(pointwise)
        >>> @register_operator("example::mirror")
        ... def follow_mirror(walk, node):
        ...     value = walk.value(node.args[0])
        ...     if value.labels.shape[-1] > 1:
        ...         raise Unsupported("it mirrors the channels")
        ...     return Value(value.shape, value.labels, value.constant.flip(-1), value.known.flip(-1))

        >>> class Mirror(nn.Module):
        ...     def forward(self, x: Tensor) -> Tensor:
        ...         return mirror(cube(x))
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), Mirror(), nn.Conv2d(8, 4, 1))
        >>> plan = slim(net, {"1": torch.arange(8) < 5}, torch.randn(2, 3, 6, 6))
        >>> net[3].weight.shape
        torch.Size([4, 5, 1, 1])
    """
    namespace, separator, _ = name.partition("::")
    if not (namespace and separator):
        raise ValueError(f"name must be an operator with its namespace, as in 'mine::gate', got {name!r}")
    key = name.removeprefix("aten::")

    def register(handler: Handler) -> Handler:
        if key in HANDLERS:
            raise ValueError(f"operator {name!r} has a handler already")
        HANDLERS[key] = handler
        return handler

    return register
