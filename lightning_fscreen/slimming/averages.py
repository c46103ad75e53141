"""Norms that are written out: a mean over all channels, plus an eps, to a power, times …, times a parameter.

RMSNorm is x · (mean x² + eps)^(−1/2) · gain; the global response normalisation of ConvNeXt-V2 is
x + shift + x · ‖x‖ · (mean ‖x‖ + eps)^(−1) · gain. Channels that are always zero can go from such a mean (`Average`).
"""

from __future__ import annotations

from typing import Any

from lightning_fscreen.slimming.elementwise import parameter_behind
from lightning_fscreen.slimming.interpreter import Handler, Unsupported, Walk, arguments, module_of, operator_name
from lightning_fscreen.slimming.normalising import averaged
from lightning_fscreen.slimming.pooling import reduce
from lightning_fscreen.slimming.slots import Average, Value

_POWERS = {"rsqrt": -0.5, "sqrt": 0.5, "reciprocal": -1.0}
_CASTS = ("to", "_to_copy", "type_as", "clone", "contiguous")


def mean(walk: Walk, node: Any) -> Value:
    """Over positions; or over all channels, where eps and a gain can take over what those that go did."""
    value, dims = walk.value(node.args[0]), arguments(node).get("dim") or ()
    channels = [dim for dim in dims if value.labels.shape[dim] > 1]
    if len(channels) != 1 or len(dims) != 1 or not node.users:
        return reduce(walk, node)
    found = _follow(walk, node)
    if isinstance(found, str):
        raise Unsupported(f"it averages over all channels, and {found}")
    gain, power, eps = found
    labels, constant, known = walk.slots.along(value, channels[0])
    average = Average(labels, module_of(node), eps, gain, power)
    averaged(walk, average, constant, known)
    return Value.pinned(tuple(node.meta["val"].shape))


def _follow(walk: Walk, node: Any) -> tuple[str, float, str] | str:
    """From a mean to the parameter that takes a factor of it; or why there is none, in words.

    Returns:
        The gain, the power of D/n that it takes, and the attribute of the module that is added to the mean.
    """
    module, eps, power = module_of(node), None, 1.0
    while True:
        users = [user for user in node.users if user.meta.get("val") is not None]  # assertions have none
        if len(users) != 1:
            return "it is used more than once"
        before, node = node, users[0]
        name, alone = operator_name(node), node.all_input_nodes == [before]
        if name == "add" and alone and eps is None and power == 1:
            eps = _attribute(walk, module, node.args[1])
            if eps is None:
                return "the eps that is added to it is no attribute of its module"
        elif name in _POWERS:
            power *= _POWERS[name]
        elif name == "pow" and alone and isinstance(node.args[1], float | int):
            power *= node.args[1]
        elif name == "div" and node.args[0] is not node.args[1]:
            power = -power if node.args[1] is before else power
        elif name in ("mul", "addcmul"):
            factors = [item for item in node.args[-2:] if item is not before]
            if len(factors) != 1:
                return "it is squared, or added to something"
            gain = parameter_behind(walk, factors[0])
            if gain is not None:
                return (gain, -power, eps) if eps is not None else "there is no eps that is added to it"
        elif name not in _CASTS:
            return "no parameter is multiplied by what it gives"


def _attribute(walk: Walk, module: str, value: Any) -> str | None:
    """Name of a module's attribute that has a value."""
    own = vars(walk.modules[module])
    names = (name for name, item in own.items() if isinstance(item, float) and item == value)
    return next((name for name in names if not name.startswith("_")), None)


HANDLERS: dict[str, Handler] = {"mean": mean}
