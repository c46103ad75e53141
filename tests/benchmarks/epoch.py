"""Seconds per epoch of lenet300_mnist: with the callback, without it, and in a bare hand-written PyTorch loop.

    python tests/benchmarks/epoch.py [data.root=FOLDER]

The variants take turns in one process (two processes with the same work differ by more than the callback costs); an
epoch is training on 50,000 images, validation on 10,000, logging and the checkpoint (the bare loop: training and
validation alone). The epochs compared are those of the annealing window, in which statistics are collected and weights
pruned; the first one is warm-up. Prints the median over the rounds of each variant's median epoch, and the ratios round
by round.
"""

import statistics
import sys
import tempfile
import time
from itertools import pairwise
from typing import ClassVar

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.pytorch import Callback
from torch.nn import functional as F

from lightning_fscreen.cli.filling import fit_to_data
from lightning_fscreen.cli.run import run
from lightning_fscreen.data import random_crop

ROUNDS, EPOCHS = 9, 5
WARM_UP, WINDOW = 1, 4  # epochs; with end_epoch at WINDOW every epoch compared collects and prunes
VARIANTS = {"callback": [], "without": ["~callbacks.fscreen"], "bare": []}


class Stopwatch(Callback):
    """Time from the start of one epoch to the start of the next."""

    times: ClassVar[list[float]] = []

    def on_train_epoch_start(self, trainer, pl_module):
        Stopwatch.times.append(time.perf_counter())


def bare(config):
    """The same network, data, batches, shifts and optimizer without Lightning, callbacks or logging."""
    torch.manual_seed(config.seed)
    data = instantiate(config.data)
    data.prepare_data()
    data.setup("fit")
    fit_to_data(config, data)
    model = instantiate(config.model)
    net, optimizer = model.net, model.optimizer(model.net.parameters())
    images, labels = data.train_dataloader().dataset[:]
    val_images, val_labels = data.val_dataloader().dataset[:]
    for _ in range(EPOCHS):
        Stopwatch.times.append(time.perf_counter())
        net.train()
        for index in torch.randperm(len(images)).split(config.data.batch_size):
            batch = data.normalize(random_crop(images[index], config.data.crop_padding))
            loss = F.cross_entropy(net(batch), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            wrong = 0
            for x, y in zip(val_images.split(1000), val_labels.split(1000), strict=True):
                wrong += int((net(data.normalize(x)).argmax(1) != y).sum())


def measure(variant, overrides):
    Stopwatch.times.clear()
    with (
        tempfile.TemporaryDirectory() as folder,
        initialize_config_module("lightning_fscreen.conf", version_base="1.3"),
    ):
        quiet = ["extras.print_config=false", "extras.print_report=false", "extras.figures=false"]
        fixed = [f"trainer.max_epochs={EPOCHS}", f"paths.output_dir={folder}", "experiment=lenet300_mnist"]
        watch = [f"+callbacks.stopwatch._target_={__name__}.Stopwatch"] if variant != "bare" else []
        if variant == "callback":
            fixed.append(f"callbacks.fscreen.end_epoch={WINDOW}")
        config = compose("train", [*quiet, *fixed, *watch, *VARIANTS[variant], *overrides])
        (bare if variant == "bare" else run)(config)
    times = Stopwatch.times
    epochs = [end - start for start, end in pairwise(times)]
    return statistics.median(epochs[WARM_UP:WINDOW])


def main(overrides):
    seconds = {variant: [] for variant in VARIANTS}
    for _ in range(ROUNDS):
        for variant in VARIANTS:
            seconds[variant].append(measure(variant, overrides))
    print(f"lenet300_mnist, {torch.get_num_threads()} threads, {ROUNDS} rounds, epochs {WARM_UP + 1}–{WINDOW}")
    for variant, values in seconds.items():
        print(f"{variant:10s} {statistics.median(values):.3f} s per epoch ({min(values):.3f}–{max(values):.3f})")
    for first, second in (("callback", "without"), ("callback", "bare")):
        ratios = sorted(a / b for a, b in zip(seconds[first], seconds[second], strict=True))
        print(f"{first} / {second}: {statistics.median(ratios):.3f} ({ratios[0]:.3f}–{ratios[-1]:.3f})")


if __name__ == "__main__":
    main(sys.argv[1:])
