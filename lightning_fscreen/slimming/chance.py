"""Chance that does not depend on widths: a smaller network would draw other numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Draw = Callable[..., Any]
"""(uniform numbers, the arguments of the call by name) → what is drawn."""


class SameChance(TorchFunctionMode):
    """Inside, nothing is dropped, and all elements of an instance get the same random number, whatever their shape.

    Numbers that are drawn one after the other are others; where a function of torch's draws them itself
    (`F.gumbel_softmax`), they are its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name.rstrip("_") in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name == "native_dropout":
            values = args[0] if args else kwargs["input"]
            return values, torch.ones_like(values, dtype=torch.bool)
        if name in _SWITCHES:
            place, argument, off = _SWITCHES[name]
            if len(args) > place:
                args = (*args[:place], off, *args[place + 1 :])
            else:
                kwargs = {**kwargs, argument: off}
        result = func(*args, **kwargs)
        if name in _DRAWS and isinstance(result, Tensor) and result.is_floating_point():
            names, draw = _DRAWS[name]
            result.copy_(self._drawn(result, draw, {**dict(zip(names, args, strict=False)), **kwargs}))
        return result

    def _drawn(self, like: Tensor, draw: Draw, given: Mapping[str, Any]) -> Tensor:
        self._calls += 1
        rows = len(like) if like.ndim > 1 else 1
        generator = torch.Generator().manual_seed(self._calls)
        uniform = torch.rand(rows, generator=generator, dtype=torch.float64, device="cpu")
        uniform = uniform.to(like.device).reshape([rows, *[1] * (like.ndim - 1)] if like.ndim else [])
        own = {_PARAMETERS[name]: value for name, value in given.items() if name in _PARAMETERS}
        return torch.as_tensor(draw(uniform, **own)).to(like)


def _uniform(uniform: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * uniform


def _normal(uniform: Tensor, mean: Any = 0.0, std: Any = 1.0) -> Any:
    return mean + std * torch.special.ndtri(uniform)


def _bernoulli(uniform: Tensor, p: Any = 0.5) -> Any:
    return uniform < p


def _exponential(uniform: Tensor, lambd: float = 1.0) -> Tensor:
    return -torch.log1p(-uniform) / lambd


_DROPOUTS = {
    *("dropout", "dropout1d", "dropout2d", "dropout3d"),
    *("alpha_dropout", "feature_dropout", "feature_alpha_dropout"),
}

_SWITCHES = {
    "scaled_dot_product_attention": (4, "dropout_p", 0.0),
    "multi_head_attention_forward": (10, "dropout_p", 0.0),
    "rrelu": (3, "training", False),
}
"""Function that drops or draws → place and name of the argument that says so, and what switches it off."""

_DRAWS: dict[str, tuple[tuple[str, ...], Draw]] = {
    **dict.fromkeys(("rand", "rand_like"), ((), _uniform)),
    **dict.fromkeys(("randn", "randn_like"), ((), _normal)),
    "uniform_": (("", "from", "to"), _uniform),
    "normal_": (("", "mean", "std"), _normal),
    "normal": (("mean", "std"), _normal),
    "bernoulli": (("p",), _bernoulli),
    "bernoulli_": (("", "p"), _bernoulli),
    "exponential_": (("", "lambd"), _exponential),
}
"""Function → names of its arguments, and how it draws."""

_PARAMETERS = {"from": "low", "to": "high", **{name: name for name in ("mean", "std", "p", "lambd")}}
"""What torch calls the parameters of a distribution → what they are called here."""
