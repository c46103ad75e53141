"""Heads and hidden units of trained networks, pruned by one callback as these are fine-tuned.

    PYTHONPATH=. python tests/benchmarks/in_one_fit.py RESULTS.jsonl FOLDER NETWORK SEED METHOD...  # resumable
    PYTHONPATH=. python tests/benchmarks/in_one_fit.py RESULTS.jsonl  # the table

FOLDER: an image folder of CIFAR-10; NETWORK: vit or convnext. The dense network of equal_cost.py, which has run before
with its results in the same folder, trains for two more epochs on a quarter of its images under one cosine schedule;
METHOD, a criterion, prunes a share of its heads, of its hidden units, or of both at once after ten of the 80 steps.
"dense" prunes nothing.
"""

import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader, TensorDataset

from lightning_fscreen import ScreeningPruningCallback
from lightning_fscreen.cli.tables import summary
from lightning_fscreen.data import random_crop, random_horizontal_flip
from lightning_fscreen.models.classifier import ImageClassifier
from tests.benchmarks.equal_cost import IMAGES, NETWORKS, error, images_of, lines_of, macs
from tests.conftest import trainer

EPOCHS, STEPS = 2, 10
KINDS = {"heads": "kind=head", "hidden units": "kind=neuron", "both": ["kind=head", "kind=neuron"]}
CELLS = {  # what is pruned of every network, and how much
    "vit": [(kind, amount) for kind in KINDS for amount in (0.3, 0.5, 0.7)],
    "convnext": [("hidden units", amount) for amount in (0.5, 0.7, 0.9)],
}


class Augmented(ImageClassifier):
    """Crops and flips what it trains on."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels = batch
        return random_horizontal_flip(random_crop(images, 4)), labels


def fine_tuned(name, state, criterion, kind, amount, images, labels):
    """What the default trainer makes of it."""
    recipe = NETWORKS[name]
    network = recipe.build()
    network.load_state_dict(state)
    optimizer = partial(recipe.optimizer, lr=recipe.tuning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    model = Augmented(network, optimizer, cosine, scheduler_interval="step")
    pruning = []
    if amount:
        window = {"end_step": STEPS, "prune_every": STEPS, "schedule": "one_shot"}
        pruning = [ScreeningPruningCallback("unit", amount, criterion=criterion, include=KINDS[kind], **window)]
    loader = DataLoader(TensorDataset(images, labels), 128, shuffle=True)
    trainer(pruning, max_epochs=EPOCHS).fit(model, loader)
    return network


def key_of(line):
    """What a line is of."""
    return line["network"], line["kind"], line["amount"], line["method"], line["seed"]


def main(results, folder, name, seed, *methods):
    """Run what is missing."""
    results, seed = Path(results), int(seed)
    checkpoint = results.absolute().with_name("equal_cost.work") / f"{name}_{seed}.pt"
    state = torch.load(checkpoint, weights_only=True)
    (images, labels), test_set = images_of(folder, seed)
    images, labels = images[: IMAGES // 4], labels[: IMAGES // 4]
    for method in methods:
        for kind, amount in [("both", 0.0)] if method == "dense" else CELLS[name]:
            key = {"network": name, "kind": kind, "method": method, "amount": amount, "seed": seed}
            if key_of(key) in map(key_of, lines_of(results)):
                continue
            seed_everything(1000 + seed, verbose=False)
            network = fine_tuned(name, state, method, kind, amount, images, labels)
            line = key | {"macs": macs(network), "test_error": error(network, *test_set)}
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")


def table(results):
    """Markdown: errors, and in brackets the multiply–adds that are left."""
    lines = lines_of(Path(results))
    methods = [name for name in dict.fromkeys(line["method"] for line in lines) if name != "dense"]
    rows = [f"| | | pruned | {' | '.join(methods)} |", "|---" * (3 + len(methods)) + "|"]
    for network, cells in CELLS.items():
        dense = [line for line in lines if key_of(line)[:1] == (network,) and line["method"] == "dense"]
        for kind, amount in cells:
            groups = [[line for line in lines if key_of(line)[:4] == (network, kind, amount, own)] for own in methods]
            rows.append(f"| {network} | {kind} | {amount:.0%} | {' | '.join(_cell(own, dense) for own in groups)} |")
        rows.append(f"| {network} | dense | | {' | '.join([_cell(dense, dense)] * len(methods))} |")
    return "\n".join(rows) + "\n"


def _cell(lines, dense):
    if not lines:
        return "–"
    share = statistics.fmean(line["macs"] for line in lines) / dense[0]["macs"]
    number = "" if len(lines) == 3 else f"; seeds: {len(lines)}"
    return f"{summary([100 * line['test_error'] for line in lines])} ({share:.0%}{number})"


if __name__ == "__main__":
    print(table(sys.argv[1]), end="") if len(sys.argv) == 2 else main(*sys.argv[1:])
