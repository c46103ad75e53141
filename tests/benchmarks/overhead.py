"""What the callback costs a whole training, against the same without it and against Lightning's ModelPruning.

    python tests/benchmarks/overhead.py EXPERIMENT [ROUNDS] [OVERRIDES...]

The variants take turns in one process: trainings of 10 epochs, without the callback, with it as the experiment says but
slim=false (the network keeps its size, so that only the work added is seen), with slimming, and with ModelPruning,
which prunes weights by magnitude at the end of every epoch. Prints, as ratios to the training without the callback
round by round, the seconds of all epochs but the first, and those of the epochs that gather statistics.
"""

import statistics
import sys
import tempfile
import time
from itertools import pairwise

from hydra import compose, initialize_config_module
from lightning.pytorch import Callback

from lightning_fscreen import ScreeningPruningCallback
from lightning_fscreen.cli import run

EPOCHS = 10
PEER = "+callbacks.peer"
VARIANTS = {
    "without": ["~callbacks.fscreen"],
    "masks": ["callbacks.fscreen.slim=false"],
    "slimming": [],
    "ModelPruning": [
        "~callbacks.fscreen",
        f"{PEER}._target_=lightning.pytorch.callbacks.ModelPruning",
        f"{PEER}.pruning_fn=l1_unstructured",
        f"{PEER}.amount=0.2",
    ],
}


class Watch(Callback):
    """When epochs begin, and which of them gather statistics."""

    def __init__(self):
        Watch.last, self.starts, self.gathering = self, [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.starts.append(time.perf_counter())
        own = [c for c in trainer.callbacks if isinstance(c, ScreeningPruningCallback)]
        self.gathering.append(any(c._collects(trainer.current_epoch) for c in own))

    def on_train_end(self, trainer, pl_module):
        self.starts.append(time.perf_counter())


def measure(experiment, variant, overrides):
    with (
        tempfile.TemporaryDirectory() as folder,
        initialize_config_module("lightning_fscreen.conf", version_base="1.3"),
    ):
        quiet = [f"extras.{part}=false" for part in ("print_config", "print_report", "figures", "latency")]
        fixed = [f"experiment={experiment}", f"trainer.max_epochs={EPOCHS}", f"paths.output_dir={folder}"]
        watch = [f"+callbacks.watch._target_={__name__}.Watch"]
        run(compose("train", [*fixed, *quiet, *watch, *VARIANTS[variant], *overrides]))
    return [b - a for a, b in pairwise(Watch.last.starts)], Watch.last.gathering


def main(experiment, rounds="5", *overrides):
    ratios = {}
    for _ in range(int(rounds)):
        seconds, _ = measure(experiment, "without", overrides)
        for variant in list(VARIANTS)[1:]:
            own, gathering = measure(experiment, variant, overrides)
            ratios.setdefault(f"{variant}, all epochs", []).append(sum(own[1:]) / sum(seconds[1:]))
            places = [place for place, gathers in enumerate(gathering) if gathers and place]
            if places:
                part = statistics.median(own[place] for place in places)
                whole = statistics.median(seconds[place] for place in places)
                ratios.setdefault(f"{variant}, epochs that gather", []).append(part / whole)
    print(f"{experiment}, {EPOCHS} epochs, {rounds} rounds, time against the training without the callback")
    for name, values in ratios.items():
        print(f"{name:32s} {statistics.median(values):.3f} ({min(values):.3f}–{max(values):.3f})")


if __name__ == "__main__":
    main(*sys.argv[1:])
