"""How the statistics grow with the network: memory and time from a million to ten thousand million weights.

    python tests/benchmarks/growth.py

Four square linear layers with ReLU, batches of 32, 10 classes. Memory: the bytes of all tensors that exist after the
sums of three steps and did not before, as a share of the weights'. Time: training steps (SGD) with and without
collection in turns, median ratio with its range; and the F-statistics of all layers at the end of an epoch. What does
not fit in the memory at hand is built of meta tensors, and only its sums are counted.
"""

import gc
import math
import os
import statistics
import time
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from lightning_fscreen.candidates.weights import Weights

LAYERS, CLASSES, BATCH, STEPS = 4, 10, 32, 7
COUNTS = (10**6, 10**7, 10**8, 10**9, 10**10)


def network(count, device):
    width = round(math.sqrt(count / LAYERS))
    with torch.device(device):
        widths = pairwise([width] * (LAYERS + 1))
        layers = [layer for inputs, outputs in widths for layer in (nn.Linear(inputs, outputs), nn.ReLU())]
        return nn.Sequential(*layers[:-1])


def tensor_bytes():
    gc.collect()
    found = (item for item in gc.get_objects() if isinstance(item, torch.Tensor))
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in found}.values())


def step(model, optimizer, collector=None):
    images, labels = torch.randn(BATCH, model[0].in_features), torch.randint(0, CLASSES, (BATCH,))
    start = time.perf_counter()
    if collector is not None:
        collector.attach()
    loss = F.cross_entropy(model(images), labels)
    if collector is not None:
        collector.remove()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if collector is not None:
        collector.update(labels)
    return time.perf_counter() - start


def measure(count):
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 3 * 4 * count > free:  # weights, gradients, and room for one more
        model = network(count, "meta")
        collector = Weights(model, None, None).collector(CLASSES)
        sums = sum(tensor.nbytes for tensor in collector.state_dict()["moments"].values())
        return f"{sums / 2**20:,.1f} MiB (sums alone, meta)", sums / (4 * count), "–", "–"
    model = network(count, "cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step(model, optimizer)
    before = tensor_bytes()
    collector = Weights(model, None, None).collector(CLASSES)
    for _ in range(3):
        step(model, optimizer, collector)
    taken = tensor_bytes() - before
    ratios = sorted(step(model, optimizer, collector) / step(model, optimizer) for _ in range(STEPS))
    start = time.perf_counter()
    collector.statistics()
    seconds = time.perf_counter() - start
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
    return f"{taken / 2**20:,.1f} MiB", taken / (4 * count), ratio, f"{1000 * seconds:.1f} ms"


def main():
    print("| weights | statistics | of the weights | step with / without | F of all layers |\n|---|---|---|---|---|")
    for count in COUNTS:
        memory, share, ratio, seconds = measure(count)
        print(f"| {count:,} | {memory} | {100 * share:.2f} % | {ratio} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
