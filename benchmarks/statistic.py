"""FStatistic.update over 60,000 × 784 in batches against one call of scikit-learn's f_classif.

    python benchmarks/statistic.py

Interleaved pairs in one process; prints each side's median, the median ratio with its range, and the metric's memory.
"""

import statistics
import time

import torch
from sklearn.feature_selection import f_classif

from lightning_fscreen import FStatistic

ROWS, FEATURES, CLASSES, PAIRS = 60_000, 784, 10, 7


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def streamed(features, labels, batch_size):
    metric = FStatistic(FEATURES, CLASSES)
    for batch, batch_labels in zip(features.split(batch_size), labels.split(batch_size), strict=True):
        metric.update(batch, batch_labels)
    return metric


def main():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(ROWS, FEATURES, generator=generator)
    labels = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    expected = torch.from_numpy(f_classif(features.double().numpy(), labels.numpy())[0])
    print(f"{ROWS:,} × {FEATURES} float32, {CLASSES} classes, {torch.get_num_threads()} threads, {PAIRS} pairs")
    for batch_size in (128, 1000):
        metric = streamed(features, labels, batch_size)
        error = float((metric.compute() / expected - 1).abs().max())
        ours, theirs = [], []
        for _ in range(PAIRS):
            ours.append(seconds(lambda: streamed(features, labels, batch_size)))  # noqa: B023
            theirs.append(seconds(lambda: f_classif(features.numpy(), labels.numpy())))
        ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
        state = sum(getattr(metric, name).nbytes for name in metric._defaults)
        print(
            f"batches of {batch_size:5d}: FStatistic {statistics.median(ours):.3f} s, f_classif "
            f"{statistics.median(theirs):.3f} s, {statistics.median(ratios):.1f} × faster "
            f"({ratios[0]:.1f}–{ratios[-1]:.1f}); state {state:,} bytes = (C + 2)·p + C float64; "
            f"largest relative difference {error:.1e}"
        )


if __name__ == "__main__":
    main()
