"""Error at equal multiply–adds: ways to prune a trained network at once, each followed by the same fine-tuning.

    PYTHONPATH=. python tests/benchmarks/equal_cost.py RESULTS.jsonl FOLDER NETWORK SEED [METHOD ...]  # resumable
    PYTHONPATH=. python tests/benchmarks/equal_cost.py RESULTS.jsonl  # the table

FOLDER: an image folder of CIFAR-10; NETWORK: resnet20, or vgg16 (VGG-16-BN of a quarter of the width). Needs torch-
pruning==1.6.1. A dense network trains for ten epochs on 20,000 of the images; every method prunes it until 75, 50 or 25
% of its multiply–adds are left, as torch's counter counts them, and trains what is left for two more. Methods that take
another amount get the one that leaves this cost, by bisection. "at once" is the error before these.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_fscreen import models, prune
from lightning_fscreen.cli.tables import summary
from lightning_fscreen.data import ImageFolderDataModule
from lightning_fscreen.trained.arguments import settings_of
from lightning_fscreen.trained.one_shot import observed
from tests.benchmarks.redundancy import error, tensors, train

LEFT = (0.75, 0.5, 0.25)
IMAGES, EPOCHS, TUNING = 20_000, 10, 2
INSTANCES = 4000
NETWORKS = {"resnet20": models.resnet20, "vgg16": lambda: models.vgg16_bn(width_mult=0.25)}


def macs(network):
    """For one image, independently of the package."""
    counter = FlopCounterMode(display=False)
    with counter:
        network.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() / 2


def bisected(left, share_of):
    """The amount with which the share of the multiply–adds comes nearest to what is to be left."""
    low, high, best = 0.0, 1.0, (1.0, 0.0)
    for _ in range(10):
        amount = (low + high) / 2
        share = share_of(amount)
        best = min(best, (abs(share - left), amount))
        low, high = (amount, high) if share > left else (low, amount)
    return best[1]


def ours(network, left, batches, **arguments):
    """One call, in place of a copy."""
    smaller = copy.deepcopy(network)
    prune(smaller, batches, 1 - left, progress=False, **arguments)
    return smaller


def candidates(network, left, batches):
    """The same errors, without regard to what a unit costs."""
    found = observed(copy.deepcopy(network), settings_of(budget="candidates"), batches, None, progress=False, title="")

    def share_of(amount):
        report = found.rehearse(found.choose(amount)).report
        return report.after.macs / report.before.macs

    amount, smaller = bisected(left, share_of), copy.deepcopy(network)
    prune(smaller, batches, amount, budget="candidates", progress=False)
    return smaller


def peer(network, left, importance, pruner="BasePruner"):
    """Torch-Pruning, every layer alike, which is its default."""
    import torch_pruning as tp  # only this method needs it, and the documents' tables do not

    def pruned(amount):
        smaller = copy.deepcopy(network).eval()
        last = [module for module in smaller.modules() if isinstance(module, nn.Linear)][-1]
        rank, kind = getattr(tp.importance, importance)(), getattr(tp.pruner, pruner)
        kind(smaller, torch.zeros(2, 3, 32, 32), importance=rank, pruning_ratio=amount, ignored_layers=[last]).step()
        return smaller

    return pruned(bisected(left, lambda amount: macs(pruned(amount)) / macs(network)))


METHODS = {
    "errors per cost": ours,
    "errors per cost, streams": lambda network, left, batches: ours(network, left, batches, streams=True),
    "errors alone": candidates,
    "screening per cost": lambda network, left, batches: ours(network, left, batches, criterion="screening"),
    "Torch-Pruning, norms of groups": lambda network, left, batches: peer(network, left, "GroupMagnitudeImportance"),
    "Torch-Pruning, scales": lambda network, left, batches: peer(network, left, "BNScaleImportance", "BNScalePruner"),
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
    network = NETWORKS[name]()
    if checkpoint.exists():
        network.load_state_dict(torch.load(checkpoint, weights_only=True))
    else:
        train(network, *train_set, EPOCHS, 0.1, 128, True)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), checkpoint)
        keep({"method": "dense", "left": 1.0, "macs": macs(network), "at_once": error(network, *test_set)})
    images, labels = train_set
    shown = torch.linspace(0, len(images) - 1, INSTANCES).long().split(500)
    for left in LEFT:
        for method in methods or METHODS:
            if any(
                (line["network"], line["seed"], line["method"], line["left"]) == (name, seed, method, left)
                for line in lines_of(results)
            ):
                continue
            torch.manual_seed(1000 + seed)
            batches = [(images[index], labels[index]) for index in shown]
            smaller = METHODS[method](network, left, batches)
            size = sum(parameter.numel() for parameter in smaller.parameters())
            line = {"method": method, "left": left, "macs": macs(smaller), "params": size}
            line |= {"at_once": error(smaller, *test_set)}
            torch.manual_seed(1000 + seed)
            train(smaller, *train_set, TUNING, 0.05, 128, True)
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
