"""What the callback costs a network under torch.compile, and what that is worth: ResNet-20 on random 32 × 32 images.

    PYTHONPATH=. python tests/benchmarks/compiled.py [ROUNDS]

Prints time as a ratio to the same training without the callback, median and range over the rounds, from seconds per
epoch of 1,280 images in batches of 64 (median over the epochs of a kind): dense epochs in which nothing is gathered,
those in which statistics are gathered (compiled code runs eagerly there), and epochs of fine-tuning (half of the
channels gone). The first epoch of each kind is left out, for it compiles. Each training in a process of its own. Says,
too, how far the outputs of the compiled and of the eager slim network are apart.
"""

import json
import statistics
import subprocess
import sys
import time

import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, TensorDataset

from lightning_fscreen import ScreeningPruningCallback, models
from tests.conftest import Classifier, trainer

DENSE, GATHERING, TUNING = 5, 4, 5  # epochs
KINDS = {"dense": "dense epochs", "gathering": "epochs that gather", "tuning": "half of the channels gone"}


class Stopwatch(Callback):
    def __init__(self):
        self.starts = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.starts.append(time.perf_counter())

    on_train_end = on_train_epoch_start


def train(variant):
    torch.manual_seed(0)
    network = models.resnet20()
    model = Classifier(torch.compile(network) if variant.startswith("compiled") else network)
    model.num_classes = 10
    end = DENSE + GATHERING
    callback = ScreeningPruningCallback(
        amount=0.5, start_epoch=end - 1, end_epoch=end, schedule="one_shot", collect_epochs=GATHERING
    )
    watch = Stopwatch()  # after the callback, whose slimming is no part of an epoch
    callbacks = [watch] if variant.endswith("without") else [callback, watch]
    images = TensorDataset(torch.randn(1280, 3, 32, 32), torch.randint(10, (1280,)))
    trainer(callbacks, max_epochs=end + TUNING).fit(model, DataLoader(images, batch_size=64))
    seconds = [b - a for a, b in zip(watch.starts[:-1], watch.starts[1:], strict=True)]
    kinds = {"dense": seconds[1:DENSE], "gathering": seconds[DENSE + 1 : end], "tuning": seconds[end + 1 :]}
    result = {kind: statistics.median(values) for kind, values in kinds.items()}
    with torch.no_grad():
        x = torch.randn(64, 3, 32, 32)
        first, second = model.eval().net(x), network.eval()(x)
    print(json.dumps(result | {"error": float((first - second).abs().max() / second.abs().max())}))


def measure(variant):
    done = subprocess.run([sys.executable, __file__, "train", variant], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(rounds="3"):
    ratios, errors = {}, []
    for _ in range(int(rounds)):
        for mode in ("eager", "compiled"):
            without, own = measure(f"{mode} without"), measure(mode)
            errors.append(own["error"])
            for kind in KINDS:
                ratios.setdefault((mode, kind), []).append(own[kind] / without[kind])
    print("| ResNet-20 | " + " | ".join(KINDS.values()) + " |\n" + "|---" * (len(KINDS) + 1) + "|")
    for mode in ("eager", "compiled"):
        found = [ratios[mode, kind] for kind in KINDS]
        cells = [f"{statistics.median(values):.2f} × ({min(values):.2f}–{max(values):.2f})" for values in found]
        print(f"| {mode} | " + " | ".join(cells) + " |")
    print(
        f"\n(Time against the same without the callback, {rounds} rounds. The outputs of the compiled slim network and"
    )
    print(f"of the same in eager mode differ by at most {max(errors):.0e} of the largest.)")


if __name__ == "__main__":
    train(sys.argv[2]) if sys.argv[1:2] == ["train"] else main(*sys.argv[1:])
