"""Run a network in float64 without a float64 copy of it: weights are converted where they are used."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

BLOCK = 2**22  # elements of a weight that are converted at a time, where rows of it can be taken by themselves
_DEVICE = Tensor.device.__get__
_SIZES = {Tensor.shape.__get__, Tensor.size, Tensor.dim, Tensor.numel, _DEVICE}  # type: ignore[attr-defined]


class Tensors(Mapping[str, Tensor]):
    """Tensors by name that are made whenever they are asked for, and not kept."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def only(self, names: Callable[[str], bool]) -> Tensors:
        """Some of them."""
        return Tensors({name: make for name, make in self._makers.items() if names(name)})


class InDouble(TorchFunctionMode):
    """Within this mode operators get floating parameters in float64, one operator's at a time.

    Code that operators do not show to Python (an autograd function's `forward`, TorchScript) gets them as they are.

    Args:
        network: the network.
        exact: parameters by name, more exact than those in the network; they are used instead.
        device: where the operators get them.
    """

    def __init__(self, network: nn.Module, exact: Mapping[str, Tensor], device: torch.device | None = None) -> None:
        super().__init__()
        parameters = {name: tensor for name, tensor in network.named_parameters() if tensor.is_floating_point()}
        self._makers: dict[int, Callable[[], Tensor]] = {
            id(parameter): partial(exact.__getitem__, name) if name in exact else parameter.detach
            for name, parameter in parameters.items()
        }
        self._exact = {id(parameters[name]) for name in exact if name in parameters}
        self._device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == _DEVICE and self._device is not None and id(args[0]) in self._makers:
            return self._device
        if func in _SIZES or not any(id(leaf) in self._makers for leaf in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func is F.linear and self._is_large(weight := _argument(args, kwargs, 1, "weight")):
            bias = _argument(args, kwargs, 2, "bias")
            return self._linear(_argument(args, kwargs, 0, "input"), weight, bias)
        args, kwargs = pytree.tree_map(self._convert, (args, kwargs))
        return func(*args, **kwargs)

    def _is_large(self, weight: Any) -> bool:
        return id(weight) in self._makers.keys() - self._exact and weight.ndim == 2 and weight.numel() > BLOCK

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A linear layer by blocks of rows: one layer can hold most of a network."""
        rows = max(1, BLOCK // weight.shape[1])
        out = torch.cat([F.linear(x, self._double(block)) for block in weight.detach().split(rows)], -1)
        return out if bias is None else out.add_(self._convert(bias))

    def _convert(self, value: Any) -> Any:
        make = self._makers.get(id(value))
        return value if make is None else self._double(make())

    def _double(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device or tensor.device, torch.float64)


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """float32 products with all digits, where the device would round them to TF32; put back as it was.

    torch has an older and a newer set of switches, which raise or warn if one is read after the other was set.
    """
    backends = torch.backends
    if not hasattr(backends.cudnn, "conv"):  # torch before 2.9
        matmul, cudnn = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(matmul)
            backends.cudnn.allow_tf32 = cudnn
        return
    switches = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    old = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, value in zip(switches, old, strict=True):
            switch.fp32_precision = value


def let_go(error: BaseException) -> None:
    """Free what the frames of an error hold, and of those before it; its traceback still says where it was raised."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
