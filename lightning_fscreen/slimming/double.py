"""Run a network in float64 without a float64 copy of it: weights are converted where they are used."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_fscreen.slimming.depthwise import depthwise_conv, is_slow

BLOCK = 2**20  # elements of a layer's weight that are converted at a time
_DEVICE = Tensor.device.__get__
_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
_LAYERS = {F.linear, *_CONVOLUTIONS}
_CONTIGUOUS = {*_LAYERS, F.multi_head_attention_forward}  # in float64 they are many times slower on other inputs
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


@dataclass(frozen=True, eq=False)
class Exact:
    """A tensor's values in float64, with digits that its own dtype rounds away.

    Attributes:
        values: of the whole tensor or, with `dim`, of one index of this dimension, which they lack.
        dim, index: where they stand in the tensor.
    """

    values: Tensor
    dim: int | None = None
    index: int = 0

    def put(self, tensor: Tensor, first: int = 0) -> None:
        """Write them into the tensor, or into a block of its rows that begins with the row `first`."""
        part = tensor if self.dim is None else tensor.select(self.dim, self.index)
        part.copy_(self.values[first : first + len(part)])

    def is_close(self, other: Exact | None) -> bool:
        """Whether another one writes the same into the same place."""
        if other is None or (self.dim, self.index) != (other.dim, other.index):
            return False
        return torch.allclose(self.values, other.values)


class InDouble(TorchFunctionMode):
    """Within this mode operators get floating parameters in float64, one operator's at a time.

    Linear and convolution layers get theirs by blocks of rows, all in the same room: one layer can hold most of a
    network, and rooms of many sizes would leave the heap in pieces. Code that operators do not show to Python (an
    autograd function's `forward`, TorchScript) gets them as they are.

    Args:
        network: the network.
        exact: values of parameters by name, more exact than those in the network; they are used instead.
        device: where the operators get them.
    """

    def __init__(self, network: nn.Module, exact: Mapping[str, Exact], device: torch.device | None = None) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in network.named_parameters() if tensor.is_floating_point()}
        self._exact, self._device = exact, device
        self._room = torch.empty(0)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == _DEVICE and self._device is not None and id(args[0]) in self._names:
            return self._device
        if func in _SIZES or not any(id(leaf) in self._names for leaf in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func in _LAYERS and _argument(args, kwargs, 6, "groups") in (None, 1):
            weight = _argument(args, kwargs, 1, "weight")
            if id(weight) in self._names and weight.dtype != torch.float64 and weight.numel():
                return self._by_rows(func, *args, **kwargs)
        args, kwargs = pytree.tree_map(self._convert, (args, kwargs))
        if func in _CONTIGUOUS:
            args, kwargs = _contiguous((args, kwargs))
        if func in _CONVOLUTIONS and is_slow(*args, **kwargs):
            func = depthwise_conv
        return func(*args, **kwargs)

    def _by_rows(
        self,
        func: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The outputs of a layer, block by block."""
        input, bias, exact = self._convert(input), self._convert(bias), self._exact.get(self._names[id(weight)])
        input = input.contiguous()
        rows = max(1, BLOCK // weight[0].numel())
        outputs = []
        for first in range(0, len(weight), rows):
            block = self._in_room(weight.detach()[first : first + rows])
            if exact is not None:
                exact.put(block, first)
            outputs.append(func(input, block, None if bias is None else bias[first : first + rows], *args, **kwargs))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1 - weight.ndim)  # which copies even one

    def _in_room(self, block: Tensor) -> Tensor:
        """In float64, until the next one comes."""
        if self._room.numel() < block.numel():
            device = self._device or block.device
            self._room = torch.empty(max(BLOCK, block.numel()), dtype=torch.float64, device=device)
        return self._room[: block.numel()].view(block.shape).copy_(block)

    def _convert(self, value: Any) -> Any:
        name = self._names.get(id(value))
        return value if name is None else to_double(value.detach(), self._exact.get(name), self._device)


def default_eps(dtype: torch.dtype) -> float:
    """What an RMSNorm without an eps adds, for a dtype of parameters: half types are computed in float32."""
    return torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps


@contextlib.contextmanager
def own_eps(network: nn.Module) -> Iterator[None]:
    """RMSNorms without an eps keep that of their parameters' dtype in float64, too."""
    norms = [module for module in network.modules() if isinstance(module, nn.RMSNorm) and module.eps is None]
    for module in norms:
        if module.weight is not None:
            module.eps = default_eps(module.weight.dtype)
    try:
        yield
    finally:
        for module in norms:
            module.eps = None


def to_double(tensor: Tensor, exact: Exact | None, device: torch.device | None = None) -> Tensor:
    """A tensor in float64, with its exact values."""
    double = tensor.to(device or tensor.device, torch.float64)
    if exact is not None and tensor.dtype != torch.float64:  # that has them already, and may be the network's own
        exact.put(double)
    return double


def _contiguous(arguments: Any) -> Any:
    """Tensors in the order of their dimensions; what is the same object stays the same (query, key and value)."""
    done: dict[int, Tensor] = {}
    return pytree.tree_map_only(Tensor, lambda tensor: done.setdefault(id(tensor), tensor.contiguous()), arguments)


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def let_go(error: BaseException) -> None:
    """Free what the frames of an error hold, and of those before it; its traceback still says where it was raised."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
