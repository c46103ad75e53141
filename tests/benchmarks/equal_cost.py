"""Error at equal multiply–adds: ways to prune a trained network at once, each followed by the same fine-tuning.

    PYTHONPATH=. python tests/benchmarks/equal_cost.py RESULTS.jsonl FOLDER NETWORK SEED METHOD...  # resumable
    PYTHONPATH=. python tests/benchmarks/equal_cost.py RESULTS.jsonl  # the table

FOLDER: an image folder of CIFAR-10; NETWORK: resnet20, vgg16 (VGG-16-BN of a quarter of the width), vit or convnext
(the small ones). Needs torch-pruning==1.6.1. A dense network trains for ten epochs on 20,000 of the images; every
method prunes it until 75, 50 or 25 % of its multiply–adds are left, as torch's counter counts them, and trains what is
left for two more. Methods that take another amount get the one that leaves this cost, by bisection; where none does,
they are left out. "at once" is the error before these.
"""

import copy
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_fscreen import models, prune
from lightning_fscreen.cli.tables import summary
from lightning_fscreen.data import ImageFolderDataModule
from lightning_fscreen.trained.arguments import settings_of
from lightning_fscreen.trained.one_shot import observed
from tests.benchmarks.redundancy import SGD, error, tensors, train

LEFT = (0.75, 0.5, 0.25)
IMAGES, EPOCHS, TUNING = 20_000, 10, 2
INSTANCES = 4000
ADAM = partial(torch.optim.AdamW, weight_decay=0.05)
UNITS_ALONE = {"include": "kind=neuron"}


class Recipe(NamedTuple):
    """A network, and how it is trained and fine-tuned."""

    build: Any
    optimizer: Any = SGD
    rate: float = 0.1
    tuning_rate: float = 0.05


NETWORKS = {
    "resnet20": Recipe(models.resnet20),
    "vgg16": Recipe(lambda: models.vgg16_bn(width_mult=0.25)),
    "vit": Recipe(models.vit, ADAM, 1e-3, 5e-4),
    "convnext": Recipe(models.convnext, ADAM, 2e-3, 1e-3),
}


def macs(network):
    """For one image, independently of the package."""
    counter = FlopCounterMode(display=False)
    with counter:
        network.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() / 2


def bisected(left, share_of):
    """The amount with which the share of the multiply–adds comes nearest to what is to be left.

    Raises:
        ValueError: none comes near.
    """
    low, high, best = 0.0, 1.0, (1.0, 0.0)
    for _ in range(10):
        amount = (low + high) / 2
        share = share_of(amount)
        best = min(best, (abs(share - left), amount))
        low, high = (amount, high) if share > left else (low, amount)
    if best[0] > 0.05:
        raise ValueError(f"{left:.0%} cannot be left")
    return best[1]


def ours(**arguments):
    """One call, in place of a copy."""

    def pruned(network, left, batches):
        smaller = copy.deepcopy(network)
        prune(smaller, batches, 1 - left, progress=False, **arguments)
        return smaller

    return pruned


def candidates(network, left, batches):
    """The same errors, without regard to what a unit costs."""
    found = observed(copy.deepcopy(network), settings_of(budget="candidates"), batches, None, progress=False, title="")

    def share_of(amount):
        report = found.rehearse(found.choose(amount)).report
        return report.after.macs / report.before.macs

    amount, smaller = bisected(left, share_of), copy.deepcopy(network)
    prune(smaller, batches, amount, budget="candidates", progress=False)
    return smaller


def peer(importance, pruner="BasePruner", units_alone=False):
    """Torch-Pruning, every layer alike, which is its default; of the small ViT hidden units, since heads fail."""

    def pruned(network, left, batches):
        import torch_pruning as tp  # only this method needs it, and the documents' tables do not

        def reduced(amount):
            smaller = copy.deepcopy(network).eval()
            layers = {name: own for name, own in smaller.named_modules() if isinstance(own, nn.Linear | nn.Conv2d)}
            whole = [list(layers.values())[-1]]
            if units_alone or isinstance(network, models.ViT):
                whole = [own for name, own in layers.items() if not name.endswith("expand")]
            rank, kind = getattr(tp.importance, importance)(), getattr(tp.pruner, pruner)
            images = torch.zeros(2, 3, 32, 32)
            kind(smaller, images, importance=rank, pruning_ratio=amount, ignored_layers=whole).step()
            return smaller

        return reduced(bisected(left, lambda amount: macs(reduced(amount)) / macs(network)))

    return pruned


METHODS = {
    "errors per cost": ours(),
    "errors per cost, streams": ours(streams=True),
    "errors alone": candidates,
    "screening per cost": ours(criterion="screening"),
    "magnitude per cost": ours(criterion="magnitude"),
    "random": ours(criterion="random"),
    "errors per cost, hidden units": ours(**UNITS_ALONE),
    "Torch-Pruning, norms of groups": peer("GroupMagnitudeImportance"),
    "Torch-Pruning, norms of groups, hidden units": peer("GroupMagnitudeImportance", units_alone=True),
    "Torch-Pruning, scales": peer("BNScaleImportance", "BNScalePruner"),
}


def images_of(folder, seed):
    """Training and test images, with labels."""
    data = ImageFolderDataModule(root=folder, val_size=0)
    data.setup()
    images, labels = tensors(data.load_train(), data)
    some = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    return (images[some], labels[some]), tensors(data.load_test(), data)


def lines_of(results):
    """Those of before."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def main(results, folder, name, seed, *methods):
    """Run what is missing."""
    results, seed = Path(results), int(seed)
    train_set, test_set = images_of(folder, seed)

    def keep(line):
        with results.open("a") as file:
            file.write(json.dumps({"network": name, "seed": seed, **line}) + "\n")
        print(line, flush=True)

    checkpoint = results.absolute().with_suffix(".work") / f"{name}_{seed}.pt"
    torch.manual_seed(seed)
    recipe = NETWORKS[name]
    network = recipe.build()
    if checkpoint.exists():
        network.load_state_dict(torch.load(checkpoint, weights_only=True))
    else:
        train(network, *train_set, EPOCHS, recipe.rate, 128, True, recipe.optimizer)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), checkpoint)
        keep({"method": "dense", "left": 1.0, "macs": macs(network), "at_once": error(network, *test_set)})
    images, labels = train_set
    shown = torch.linspace(0, len(images) - 1, INSTANCES).long().split(500)
    for left in LEFT:
        for method in methods:
            if any(
                (line["network"], line["seed"], line["method"], line["left"]) == (name, seed, method, left)
                for line in lines_of(results)
            ):
                continue
            torch.manual_seed(1000 + seed)
            batches = [(images[index], labels[index]) for index in shown]
            try:
                smaller = METHODS[method](network, left, batches)
            except ValueError as reason:
                print(f"{method}, {left:.0%} left: {reason}", flush=True)
                continue
            size = sum(parameter.numel() for parameter in smaller.parameters())
            line = {"method": method, "left": left, "macs": macs(smaller), "params": size}
            line |= {"at_once": error(smaller, *test_set)}
            torch.manual_seed(1000 + seed)
            train(smaller, *train_set, TUNING, recipe.tuning_rate, 128, True, recipe.optimizer)
            keep(line | {"test_error": error(smaller, *test_set)})


def table(results):
    """Markdown; the number of seeds where it is not three."""
    lines = lines_of(Path(results))
    found, dense = {}, {}
    for line in lines:
        if line["method"] in METHODS:
            found.setdefault((line["network"], line["method"], line["left"]), []).append(100 * line["test_error"])
        else:
            dense.setdefault(line["network"], []).append(100 * line["at_once"])
    columns = [(name, left) for name in dict.fromkeys(name for name, *_ in found) for left in LEFT]
    rows = ["| | " + " | ".join(f"{name}, {left:.0%} left" for name, left in columns) + " |"]
    rows.append("|---" * (1 + len(columns)) + "|")
    for method in METHODS:
        cells = [found.get((name, method, left), []) for name, left in columns]
        if any(cells):
            rows.append(f"| {method} | {' | '.join(map(_cell, cells))} |")
    rows.append(f"| dense | {' | '.join(_cell(dense[name]) for name, _ in columns)} |")
    return "\n".join(rows) + "\n"


def _cell(errors):
    number = "" if len(errors) in (0, 3) else f" ({len(errors)})"
    return summary(errors) + number if errors else "–"


if __name__ == "__main__":
    print(table(sys.argv[1]), end="") if len(sys.argv) == 2 else main(*sys.argv[1:])
