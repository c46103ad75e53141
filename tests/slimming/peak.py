"""How much memory slimming takes beside what a training holds, as a share of the parameters' bytes.

    MALLOC_MMAP_THRESHOLD_=65536 PYTHONPATH=. python tests/slimming/peak.py MEGABYTES KEPT DTYPE…

Peak of the resident memory (Linux) in a process of its own, two lines for every dtype (channels of batch norms, hidden
units), after a small network has been
slimmed so that what is imported and compiled once does not count. With gradients, an optimizer and its momentum. The
variable lets malloc of glibc give back what is freed, instead of keeping it for later.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lightning_fscreen import slim

WIDTH = 512


def resident(key: str) -> float:
    """`VmRSS` or `VmHWM`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(key))


def network(width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
    for _ in range(depth):
        layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def mlp(width: int, depth: int) -> nn.Sequential:
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(3 * width, 3 * width), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3 * width), nn.ReLU(), *hidden, nn.Linear(3 * width, 10))


def measure(
    make: Callable[[int, int], nn.Sequential], width: int, depth: int, dtype: torch.dtype, kept: float
) -> float:
    """Largest extra memory while a network is slimmed, by the bytes of its parameters."""
    net, images = make(width, depth).to(dtype), torch.randn(2, 3, 4, 4, dtype=dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(images).sum().backward()
    optimizer.step()
    kind = nn.BatchNorm2d if make is network else nn.Linear
    units = {name: len(part.weight) for name, part in net.named_modules() if isinstance(part, kind)}
    keep = {name: torch.arange(count) < kept * count for name, count in units.items() if count > 10}
    total = sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    slim(net, keep, images, bias="fold", optimizers=optimizer)
    return (resident("VmHWM") - before) / total


if __name__ == "__main__":
    megabytes, share = map(float, sys.argv[1:3])
    torch.set_num_threads(1)
    for kind in (getattr(torch, name) for name in sys.argv[3:]):
        depth = round(megabytes * 1e6 / (kind.itemsize * 9 * WIDTH**2))
        for build in (network, mlp):
            measure(build, 16, depth, kind, share)
            print(f"{measure(build, WIDTH, depth, kind, share):.2f}")
