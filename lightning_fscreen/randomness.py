"""Global random numbers as they were."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Global random numbers are afterwards what they were before, also after an error."""
    isolation = isolate_rng()
    isolation.__enter__()
    try:
        yield
    finally:
        isolation.__exit__(None, None, None)  # told of an error, it would not put them back


@contextmanager
def seeded(seed: int, devices: Collection[torch.device] = ()) -> Iterator[None]:
    """Inside, global random numbers of torch, NumPy and Python begin at a seed; afterwards they are what they were.

    Args:
        seed: the seed.
        devices: accelerators of one kind whose random numbers are meant; those of no other are looked at.
    """
    kind = next(iter(devices)).type if devices else "cuda"
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            for device in devices:
                seed_device(device, seed)
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def seed_device(device: torch.device, seed: int) -> None:
    """Let the random numbers of one accelerator begin at a seed."""
    module: Any = getattr(torch, device.type)
    with module.device(device) if hasattr(module, "device") else nullcontext():
        module.manual_seed(seed)
