"""Measured times of single operations, and of networks, each measured once."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from lightning_fscreen.costs.latency import block_times, usable_device
from lightning_fscreen.files import replacing

log = logging.getLogger(__name__)

_BLOCK = 0.005  # seconds of calls that are timed together
_ROUNDS = 5
_NETWORK = "network of "


@dataclass(frozen=True)
class Latency:
    """What a budget of latency means.

    Attributes:
        batch_size: instances at once.
        device: where it is to be fast; None stands for where the network is.
        table: path of a JSON file, where measured times are kept by device and looked up; None keeps them in memory.

    Raises:
        ValueError: no instances; a device that is not there.
    """

    batch_size: int = 1
    device: str | None = None
    table: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ValueError(f"batch_size of latency must be a whole number from 1 on, got {self.batch_size!r}")
        if self.device is not None:
            usable_device(self.device)


DEFAULT = Latency()


@dataclass(frozen=True)
class Operation:
    """A call of an operator.

    Attributes:
        target: the operator.
        args, kwargs: what it is given; of tensors, only shapes and dtypes count.
    """

    target: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The same for operations that take the same time."""
        args, kwargs = pytree.tree_map(_described, (self.args, dict(self.kwargs)))
        named = [f"{name}={value}" for name, value in kwargs.items()]
        return f"{self.target}({', '.join([*map(str, args), *named])})"


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return value


class Timings:
    """Times of operations on one device, with as many threads as torch uses now; none is measured twice.

    They are the shortest of several rounds: whatever else a machine does makes them longer.

    Args:
        latency: the device, and the file; times that it has are used, and it takes those that are measured.
        device: where the network is, if `latency` names no device.
        known: device → operation, or network → milliseconds, of a `state_dict`.

    Attributes:
        device: the device.
        batch_size: instances at once.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(
        self, latency: Latency, device: torch.device, known: Mapping[str, Mapping[str, float]] | None = None
    ) -> None:
        self.device = device if latency.device is None else torch.device(latency.device)
        self.batch_size = latency.batch_size
        self._path = None if latency.table is None else Path(latency.table)
        own = (known or {}).get(self._name, {})
        self._networks = {key: time for key, time in own.items() if key.startswith(_NETWORK)}
        operations = {key: time for key, time in own.items() if key not in self._networks}
        self._known = {**self._read().get(self._name, {}), **operations}
        self._kept = len(self._known)
        self._awaited: dict[str, Operation] | None = None

    def of(self, operation: Operation) -> float:
        """Milliseconds; an operation that cannot be run by itself counts as none, and is named in the log."""
        key = operation.key
        if key not in self._known:
            if self._awaited is not None:
                self._awaited[key] = operation
                return 0.0
            self._measure({key: operation})
        return self._known[key]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Operations that are asked for inside are measured at the end, in turns; until then they count as nothing.

        What disturbs the machine for a while disturbs all of them then.
        """
        awaited = self._awaited = {}
        try:
            yield
        finally:
            self._awaited = None
        self._measure(awaited)

    def of_network(self, description: str, measure: Callable[[], float]) -> float:
        """Milliseconds of a network; they are in no file, since other networks may have the same description.

        Args:
            description: of its size.
            measure: measures the milliseconds.
        """
        key = f"{_NETWORK}{description}"
        if key not in self._networks:
            self._networks[key] = measure()
        return self._networks[key]

    def overhead(self) -> float:
        """Milliseconds of an operation that does next to nothing."""
        return self.of(Operation(torch.ops.aten.relu.default, (torch.empty(1, device="meta"),), {}))

    def keep(self) -> None:
        """Write what is new to the file, beside what others have written."""
        if self._path is None or len(self._known) == self._kept:
            return
        times = self._read()
        times[self._name] = {**times.get(self._name, {}), **self._known}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._path) as partial:
            partial.write_text(json.dumps(times, indent=1))
        self._kept = len(self._known)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Device → operation, or network → milliseconds."""
        return {self._name: {**self._known, **self._networks}}

    def _read(self) -> dict[str, dict[str, float]]:
        if self._path is None or not self._path.exists():
            return {}
        try:
            times = json.loads(self._path.read_text())
            times = {str(name): {str(key): float(ms) for key, ms in own.items()} for name, own in times.items()}
            if not all(0 <= ms < math.inf for own in times.values() for ms in own.values()):
                raise ValueError("a time is below zero, or not finite")
            return times
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{str(self._path)!r} is no table of latencies ({error}); remove it, or name another file"
            ) from error

    @property
    def _name(self) -> str:
        """Of the device and of all else that times depend on."""
        if self.device.type == "cpu":
            place = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        else:
            place = torch.get_device_module(self.device).get_device_name(self.device)
        return f"{self.device.type}: {place}, torch {torch.__version__}"

    def _measure(self, operations: Mapping[str, Operation]) -> None:
        for _ in range(_ROUNDS):
            for key, operation in operations.items():
                if not self._known.get(key, math.inf):
                    continue
                try:
                    self._known[key] = min(self._measured(operation), self._known.get(key, math.inf))
                except Exception as error:  # whatever an operator raises that is given random numbers
                    log.warning("operation %s cannot be timed, it counts as nothing: %s", key, error)
                    self._known[key] = 0.0

    def _measured(self, operation: Operation) -> float:
        given = pytree.tree_map(self._real, (operation.args, dict(operation.kwargs)))
        call = functools.partial(operation.target, *given[0], **given[1])
        on_cpu = self.device.type == "cpu"
        devices, kind = ([], "cuda") if on_cpu else ([self.device], self.device.type)
        with torch.inference_mode(), torch.random.fork_rng(devices, device_type=kind):
            return 1000 * block_times([call], _BLOCK, (1, 1), _BLOCK)[0][0]

    def _real(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return self.device
        if not isinstance(value, Tensor):
            return value
        shape = tuple(value.shape)  # zeros are indices that are always there; floats should be ordinary numbers
        if not value.dtype.is_floating_point:
            return torch.zeros(shape, dtype=value.dtype, device=self.device)
        return torch.linspace(-1, 1, value.numel()).to(self.device, value.dtype).view(shape)
