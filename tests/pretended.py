"""A pretended accelerator: CPU tensors that say that they are on cuda:0, and an error where two devices meet.

Continuous integration has no GPU. Here the storage of a real CPU tensor has a tag with the device that it pretends to
be on. One mode answers questions (`.device`) and performs transfers (`.to`) as tagged copies; the other sees every
operator, backward passes included: it raises where operands on two devices meet, as CUDA does, and where deterministic
mode is on and CUDA has no such form, passes tags on to the results, and notes operators for which the host waits for
the device.
"""

import contextlib
import sys
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_PACKAGE = "/lightning_fscreen/"
CPU = torch.device("cpu")
_aten = torch.ops.aten
_WAITS = {  # the host waits for the device, to learn a value or a size
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.unique_dim.default,
    _aten._unique2.default,
    _aten.unique_consecutive.default,
    _aten.equal.default,
    _aten.repeat_interleave.Tensor,
}
_UNORDERED = {  # raise in deterministic mode; cumsum of integers does not
    _aten.kthvalue.default,
    _aten.median.dim,
    _aten.histc.default,
    _aten.put_.default,
    _aten.cumsum.default,
}
_INDEXES = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_BOOLEAN = (torch.bool, torch.uint8)


def is_real(value):
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor) and value.layout is torch.strided


def pretended(tensor):
    """The device that a tensor pretends to be on."""
    return getattr(tensor.untyped_storage(), "pretended", CPU)


def tag(tensor, device):
    tensor.untyped_storage().pretended = device
    return tensor


def as_device(value):
    device = torch.device(value if value is not None else CPU)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


class _Transfer(torch.autograd.Function):
    """A copy on another device, whose gradient goes back."""

    @staticmethod
    def forward(ctx, tensor, device):
        ctx.source = pretended(tensor)
        return tag(tensor.clone(), device)

    @staticmethod
    def backward(ctx, gradient):
        return tag(gradient.clone(), ctx.source), None


class _Answers(TorchFunctionMode):
    """Questions about devices, transfers and factories."""

    def __init__(self, operators):
        super().__init__()
        self._operators = operators

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensor = args[0] if args and is_real(args[0]) else None
        name = getattr(func, "__name__", "")
        if tensor is not None:
            device = pretended(tensor)
            asked = getattr(func, "__self__", None) if name == "__get__" else None
            if asked is Tensor.device:
                return device
            if asked in (Tensor.is_cuda, Tensor.is_cpu):
                return device.type == ("cuda" if asked is Tensor.is_cuda else "cpu")
            if func is Tensor.get_device:
                return device.index if device.type == "cuda" else -1
            if func in (Tensor.numpy, Tensor.__array__) and device != CPU:
                raise TypeError(f"can't convert {device} device type tensor to numpy; use Tensor.cpu() first")
            if func is Tensor.tolist and device != CPU:
                self._operators.note("tolist")
            if func is Tensor.cpu:
                return self._moved(tensor, CPU)
            if func is Tensor.cuda:
                return self._moved(tensor, as_device("cuda" if len(args) < 2 else args[1]))
            if func is Tensor.to:
                return self._to(func, tensor, args[1:], kwargs)
            if func is Tensor.__deepcopy__ or (name.startswith("new_") and "device" not in kwargs):
                return tag(func(*args, **kwargs), device)
        if kwargs.get("device") is not None and as_device(kwargs["device"]).type == "cuda" and "fake" not in name:
            target = as_device(kwargs.pop("device"))
            source = next((value for value in args if is_real(value)), None)
            made = func(*args, **kwargs)
            if source is not None and made is not source and name in ("as_tensor", "tensor"):
                return self._moved(made, target)
            return pytree.tree_map_only(Tensor, lambda made: tag(made, target), made)
        return func(*args, **kwargs)

    def _to(self, func, tensor, args, kwargs):
        target, dtype = kwargs.get("device"), kwargs.get("dtype")
        flags = [value for value in args if isinstance(value, bool)]
        for value in [*args, kwargs.get("other")]:
            if isinstance(value, torch.device | str) or type(value) is int:
                target = value
            elif isinstance(value, torch.dtype):
                dtype = value
            elif is_real(value):
                target, dtype = pretended(value), value.dtype
        copy = kwargs.get("copy", False) or flags[1:] == [True]
        same = func(tensor, dtype=dtype, copy=copy, memory_format=kwargs.get("memory_format"))
        waits = not (kwargs.get("non_blocking") or flags[:1] == [True])
        return same if target is None else self._moved(same, as_device(target), waits)

    def _moved(self, tensor, device, waits=True):
        if pretended(tensor) == device:
            return tensor
        if device == CPU:
            self._operators.note("copy to the host")
        elif pretended(tensor) == CPU and waits:
            self._operators.note("copy from the host")
        return _Transfer.apply(tensor, device)


class _Operators(TorchDispatchMode):
    """Where devices meet, and what the host waits for."""

    def __init__(self):
        super().__init__()
        self.waits = []
        self.count = 0

    def note(self, operator):
        """Note that the host waits for the device, and from where it was asked to."""
        frame = sys._getframe()
        while frame is not None and _PACKAGE not in frame.f_code.co_filename:
            frame = frame.f_back
        where = f"{frame.f_code.co_filename.rpartition(_PACKAGE)[2]}:{frame.f_lineno}" if frame else ""
        self.waits.append((operator, where))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operands = [value for value in pytree.tree_leaves((args, kwargs)) if is_real(value)]
        found = [pretended(value) for value in operands if value.ndim or pretended(value) != CPU]
        if func in _INDEXES:  # the host's indices are copied
            found = found[:1] + [device for device in found[1:] if device != CPU]
        devices = set(found)
        if len(devices) > 1 and func not in (_aten.copy_.default, _aten._foreach_copy_.default):
            names = " and ".join(sorted(map(str, devices)))
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {names}: {func}")
        unordered = func in _UNORDERED and (func is not _aten.cumsum.default or operands[0].is_floating_point())
        if unordered and devices - {CPU} and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(f"{func} does not have a deterministic implementation")
        result = func(*args, **kwargs)
        if devices - {CPU}:
            self.count += 1
            device = found[0]
            masked = func in _INDEXES and any(value.dtype in _BOOLEAN for value in operands[1:])
            if func in _WAITS or masked or (func is _aten.copy_.default and found[0] == CPU):
                self.note(str(func))
            for value in pytree.tree_leaves(result):
                if is_real(value) and not hasattr(value.untyped_storage(), "pretended"):
                    tag(value, device)
        return result


@contextlib.contextmanager
def pretending():
    """Within this context `cuda` exists, as far as the tensors can tell; yields what the operators were."""
    operators = _Operators()
    autocast = torch.autocast.__init__

    def on_cpu(self, device_type, *args, **kwargs):
        autocast(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def fork_rng(devices=None, *args, **kwargs):
        return fork([])

    def export_truthfully(*args, **kwargs):  # its fake tensors have devices of their own
        with _pop_mode_temporarily(), _disable_current_modes():
            return export(*args, **kwargs)

    def of_cpu(asked):
        return lambda device_type="cuda": asked("cpu" if device_type == "cuda" else device_type)

    export, fork = torch.export.export, torch.random.fork_rng
    with (
        mock.patch.object(torch, "is_autocast_enabled", of_cpu(torch.is_autocast_enabled)),
        mock.patch.object(torch, "get_autocast_dtype", of_cpu(torch.get_autocast_dtype)),
        mock.patch.object(torch.export, "export", export_truthfully),
        mock.patch.object(torch.autocast, "__init__", on_cpu),
        mock.patch.object(torch.random, "fork_rng", fork_rng),
        mock.patch("lightning_fscreen.randomness.seed_device"),
        operators,
        _Answers(operators),
    ):
        yield operators


class _Pretended(Accelerator):
    def setup_device(self, device):
        pass

    def teardown(self):
        pass

    @staticmethod
    def parse_devices(devices):
        return devices

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device("cuda", 0)]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return "pretended"

    def get_device_stats(self, device):
        return {}


def pretended_trainer(callbacks=(), precision="32-true", index=0, **arguments):
    """A Trainer on the pretended device cuda:`index`."""
    mixed = MixedPrecision(precision, "cuda") if precision.endswith("mixed") else None
    strategy = SingleDeviceStrategy(
        device=torch.device("cuda", index), accelerator=_Pretended(), precision_plugin=mixed or Precision()
    )
    defaults = {
        "max_epochs": 3,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(
        strategy=strategy,
        callbacks=list(callbacks),
        **({} if mixed or precision == "32-true" else {"precision": precision}),
        **{**defaults, **arguments},
    )
