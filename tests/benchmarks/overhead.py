"""What the callback costs a whole training, against the same without it and against Lightning's ModelPruning.

    PYTHONPATH=. python tests/benchmarks/overhead.py EXPERIMENT [ROUNDS] [OVERRIDES...]

Trainings of 10 epochs (or as many as the overrides say), in a process each, which take turns of half a second, so that
all of them meet the same moods of the machine: without the callback, with it as the experiment says but slim=false (the
network keeps its size, so that only the work added is seen), with slimming (not of weights: there it comes after
the fit), and with ModelPruning, which prunes weights by magnitude at the end of every epoch. Prints time as a ratio to
the training without the callback, median and range over the rounds: of all epochs but the first, and of those that
gather statistics, which end with the pruning.

(Threads of one process would not do: OpenMP then has more threads than there are processors, and lets them sleep
between any two operators.)
"""

import contextlib
import multiprocessing
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from typing import ClassVar

from hydra import compose, initialize_config_module
from lightning.pytorch import Callback

from lightning_fscreen import ScreeningPruningCallback
from lightning_fscreen.cli.run import run
from lightning_fscreen.fit.phases import gathers

EPOCHS = 10
SECONDS = 0.5  # of a turn
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
    """Seconds of the epochs of one training, without those in which it waits, which gather, and steps of an epoch."""

    turns: ClassVar[Connection]
    seconds: ClassVar[list[float]] = []
    gathering: ClassVar[list[bool]] = []
    steps: ClassVar[int] = 0
    _turn = 0.0

    def on_train_epoch_start(self, trainer, pl_module):
        self._lap()
        Watch.steps = trainer.num_training_batches
        self.seconds.append(0.0)
        own = [c for c in trainer.callbacks if isinstance(c, ScreeningPruningCallback)]
        self.gathering.append(any(gathers(c.settings, c._budget, trainer.current_epoch + 1) for c in own))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if time.perf_counter() - self._turn > SECONDS:
            self._lap()
            wait(self.turns)
            self._start = self._turn = time.perf_counter()

    def on_train_end(self, trainer, pl_module):
        self._lap()

    def _lap(self):
        now = time.perf_counter()
        if self.seconds:
            self.seconds[-1] += now - self._start
        self._start = now


def wait(turns):
    """Let the next one run, until it is this one's turn again."""
    turns.send(None)
    turns.recv()


def train(turns, overrides):
    """A training in a process of its own; sends what was seen of the epochs when it is over."""
    Watch.turns = turns
    watch = [f"+callbacks.watch._target_={__name__}.Watch"]
    with initialize_config_module("lightning_fscreen.conf", version_base="1.3"):
        config = compose("train", [*overrides, *watch])
    wait(turns)
    run(config)
    turns.send((Watch.seconds, Watch.gathering, Watch.steps))


def measure(experiment, names, overrides):
    """Seconds of the epochs, which gather, and their steps, by variant; they take turns in the order of these names."""
    quiet = [f"extras.{part}=false" for part in ("print_config", "print_report", "figures", "latency")]
    quiet += ["~callbacks.progress_bar", "+trainer.enable_progress_bar=false"]
    context = multiprocessing.get_context("spawn")
    training, results = {}, {}
    # Where one fails, closed connections end the others.
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as connections:
        for name in names:
            fixed = [f"experiment={experiment}", f"trainer.max_epochs={EPOCHS}", f"paths.output_dir={folder}/{name}"]
            connection, turns = context.Pipe()
            connections.enter_context(connection)
            absent = "~callbacks.fscreen" in VARIANTS[name]
            own = [item for item in overrides if not (absent and item.startswith("callbacks.fscreen."))]
            process = context.Process(target=train, args=(turns, [*fixed, *quiet, *VARIANTS[name], *own]))
            process.start()
            turns.close()
            training[name] = process, connection
        for _, connection in training.values():
            connection.recv()  # it is ready
        while training:
            for name, (process, connection) in list(training.items()):
                connection.send(None)
                if (result := connection.recv()) is not None:
                    results[name] = result
                    process.join()
                    del training[name]
    return {name: results[name] for name in VARIANTS if name in results}


def main(experiment, rounds="5", *overrides):
    ratios, pairs = {}, {}
    with initialize_config_module("lightning_fscreen.conf", version_base="1.3"):
        pruning = compose("train", [f"experiment={experiment}"]).callbacks.fscreen
    names = [name for name in VARIANTS if name != "slimming" or pruning.granularity != "weight"]
    for _ in range(int(rounds)):
        results = measure(experiment, names, overrides)
        names.append(names.pop(0))
        without, _, steps = results.pop("without")
        for name, (seconds, gathering, _) in results.items():
            ratios.setdefault(f"{name}, all epochs", []).append(sum(seconds[1:]) / sum(without[1:]))
            places = [place for place, gathers in enumerate(gathering) if gathers and place]
            if places:
                part = sum(seconds[place] for place in places) / sum(without[place] for place in places)
                ratios.setdefault(f"{name}, epochs that gather", []).append(part)
                pairs.setdefault(f"{name}, epochs that gather", []).extend(seconds[n] / without[n] for n in places)
    title = f"`{experiment}`, {len(without)} epochs of {steps} steps"
    print(f"| {title} | time against the same without the callback |\n|---|---|")
    for name, values in ratios.items():
        print(f"| {name} | {statistics.median(values):.3f} × ({min(values):.3f}–{max(values):.3f}, {rounds} rounds) |")
    for name, values in pairs.items():
        print(f"| {name}, median of pairs of epochs | {statistics.median(values):.3f} × ({len(values)} pairs) |")


if __name__ == "__main__":
    main(*sys.argv[1:])
