"""What the callback costs a whole training, against the same without it and against Lightning's ModelPruning.

    PYTHONPATH=. python tests/benchmarks/overhead.py EXPERIMENT [ROUNDS] [OVERRIDES...]

Trainings of 10 epochs in threads of one process, which take turns of 25 steps, shorter where these take over half a
second, so that all of them meet the same moods of the machine: without the callback, with it as the experiment says but
slim=false (the network keeps its size, so that only the work added is seen), with slimming, and with ModelPruning,
which prunes weights by magnitude at the end of every epoch. Prints time as a ratio to the training without the
callback, median and range over the rounds: of all epochs but the first, and of those that gather statistics, which end
with the pruning.
"""

import statistics
import sys
import tempfile
import threading
import time
from typing import ClassVar

from hydra import compose, initialize_config_module
from lightning.pytorch import Callback

from lightning_fscreen import ScreeningPruningCallback
from lightning_fscreen.cli import run

EPOCHS = 10
STEPS, SECONDS = 25, 0.5  # a turn ends after so many, or so long
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


class Turns:
    """Who may run; the others wait."""

    def __init__(self, names):
        self._names, self._changed = list(names), threading.Condition()

    def wait(self, name):
        with self._changed:
            self._changed.wait_for(lambda: self._names[0] == name)

    def pass_on(self):
        with self._changed:
            self._names.append(self._names.pop(0))
            self._changed.notify_all()

    def leave(self):
        with self._changed:
            self._names.pop(0)
            self._changed.notify_all()


class Watch(Callback):
    """Seconds of the epochs of one training, without those in which it waits, and which epochs gather statistics."""

    turns: ClassVar[Turns]
    of: ClassVar[dict] = {}

    def __init__(self, name):
        self.name, self.seconds, self.gathering = name, [], []
        Watch.of[name] = self

    def on_train_epoch_start(self, trainer, pl_module):
        self._lap()
        self.seconds.append(0.0)
        own = [c for c in trainer.callbacks if isinstance(c, ScreeningPruningCallback)]
        self.gathering.append(any(c._collects(trainer.current_epoch) for c in own))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % STEPS == 0 or time.perf_counter() - self._start > SECONDS:
            self._lap()
            Watch.turns.pass_on()
            Watch.turns.wait(self.name)
            self._start = time.perf_counter()

    def on_train_end(self, trainer, pl_module):
        self._lap()

    def _lap(self):
        now = time.perf_counter()
        if self.seconds:
            self.seconds[-1] += now - self._start
        self._start = now


def train(name, config):
    Watch.turns.wait(name)
    try:
        run(config)
    finally:
        Watch.turns.leave()


def measure(experiment, overrides):
    """Seconds of the epochs, and which gather, by variant."""
    Watch.turns = Turns(VARIANTS)
    threads = []
    with tempfile.TemporaryDirectory() as folder:
        for name, own in VARIANTS.items():
            quiet = [f"extras.{part}=false" for part in ("print_config", "print_report", "figures", "latency")]
            quiet += ["~callbacks.progress_bar", "+trainer.enable_progress_bar=false"]
            fixed = [f"experiment={experiment}", f"trainer.max_epochs={EPOCHS}", f"paths.output_dir={folder}/{name}"]
            watch = [f"+callbacks.watch._target_={__name__}.Watch", f"+callbacks.watch.name={name}"]
            with initialize_config_module("lightning_fscreen.conf", version_base="1.3"):
                config = compose("train", [*fixed, *quiet, *watch, *own, *overrides])
            threads.append(threading.Thread(target=train, args=(name, config)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return {name: (watch.seconds, watch.gathering) for name, watch in Watch.of.items()}


def main(experiment, rounds="5", *overrides):
    ratios = {}
    for _ in range(int(rounds)):
        results = measure(experiment, overrides)
        without, _ = results.pop("without")
        for name, (seconds, gathering) in results.items():
            ratios.setdefault(f"{name}, all epochs", []).append(sum(seconds[1:]) / sum(without[1:]))
            places = [place for place, gathers in enumerate(gathering) if gathers and place]
            if places:
                part = sum(seconds[place] for place in places) / sum(without[place] for place in places)
                ratios.setdefault(f"{name}, epochs that gather", []).append(part)
    print(f"| `{experiment}`, {EPOCHS} epochs | time against the same without the callback |\n|---|---|")
    for name, values in ratios.items():
        print(f"| {name} | {statistics.median(values):.3f} × ({min(values):.3f}–{max(values):.3f}, {rounds} rounds) |")


if __name__ == "__main__":
    main(*sys.argv[1:])
