"""FStatistic.update over 60,000 × 784 in batches against one call of scikit-learn's f_classif.

    python tests/benchmarks/statistic.py

Interleaved pairs in one process; prints each side's median, and the median ratio with its range.
"""

import statistics
import time
from functools import partial

import torch
from sklearn.feature_selection import f_classif

from lightning_fscreen import FStatistic

ROWS, FEATURES, CLASSES, PAIRS = 60_000, 784, 10, 9


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
    values = torch.rand(ROWS, FEATURES, generator=generator)
    labels = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    expected = torch.from_numpy(f_classif(values.double().numpy(), labels.numpy())[0])
    print(
        f"| {ROWS:,} × {FEATURES}, {torch.get_num_threads()} threads | FStatistic | one call of f_classif | "
        f"faster (range of {PAIRS} pairs) | largest relative difference |\n{'|---' * 5}|"
    )
    for dtype in (torch.float32, torch.float64):
        features = values.to(dtype)
        for batch_size in (128, 1000, 5000):
            metric = streamed(features, labels, batch_size)
            error = float((metric.compute() / expected - 1).abs().max())
            ours, theirs = [], []
            for _ in range(PAIRS):
                ours.append(seconds(partial(streamed, features, labels, batch_size)))
                theirs.append(seconds(partial(f_classif, features.numpy(), labels.numpy())))
            ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
            print(
                f"| {str(dtype).removeprefix('torch.')}, batches of {batch_size:,} | {statistics.median(ours):.3f} s | "
                f"{statistics.median(theirs):.3f} s | {statistics.median(ratios):.1f} × "
                f"({ratios[0]:.1f}–{ratios[-1]:.1f}) | {error:.0e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
