"""Which channels to keep: by scale, by F one by one, by what a channel adds to those kept already, at random.

    PYTHONPATH=. python tests/benchmarks/redundancy.py RESULTS.jsonl FOLDER SEED...
    PYTHONPATH=. python tests/benchmarks/redundancy.py RESULTS.jsonl  # the table

FOLDER: an image folder of CIFAR-10. Three tasks, each pruned at once, every layer alike, and fine-tuned: ResNet-20 on
scikit-learn's digits; ResNet-20 on 10,000 images of CIFAR-10; and that network, trained on ten classes, for two of them
with 800 images. Statistics are those of 4,000 training instances (or all there are) in eval mode, a channel being the
mean of its activation over the positions.

"Redundancy" selects forward: next comes the channel that lowers Wilks' Λ = |W| / |T| of those kept most, W and T the
covariances within classes and of all instances; it has the least Var(x | kept, class) / Var(x | kept).
"""

import copy
import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_fscreen import models, slim
from lightning_fscreen.cli.tables import summary
from lightning_fscreen.data import DigitsDataModule, ImageFolderDataModule, random_crop, random_horizontal_flip
from lightning_fscreen.functional import f_statistic

AMOUNTS = (0.5, 0.8)
METHODS = ("magnitude", "F", "redundancy", "random")
PAIRS = {"cat/dog": (3, 5), "airplane/ship": (0, 8)}
INSTANCES = 4000


SGD = partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=5e-4)


def train(network, images, labels, epochs, rate, batch_size, augmented, make_optimizer=SGD):
    optimizer = make_optimizer(network.parameters(), lr=rate)
    steps = epochs * -(-len(images) // batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(batch_size):
            x = images[batch]
            if augmented:
                x = random_horizontal_flip(random_crop(x, 4))
            with torch.autocast("cpu", torch.bfloat16, enabled=augmented and make_optimizer is SGD):
                loss = F.cross_entropy(network(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()


@torch.no_grad()
def error(network, images, labels):
    network.eval()
    outputs = torch.cat([network(part) for part in images.split(1000)])
    return float((outputs.argmax(1) != labels).double().mean())


@torch.no_grad()
def activations(network, images):
    """(N, channels) of every batch norm, behind the ReLU that follows all of them here."""
    found = {}

    def keep(name):
        return lambda module, args, output: found.setdefault(name, []).append(output.relu().mean((2, 3)).double())

    norms = {name: module for name, module in network.named_modules() if isinstance(module, _BatchNorm)}
    handles = [module.register_forward_hook(keep(name)) for name, module in norms.items()]
    network.eval()
    for part in images[torch.linspace(0, len(images) - 1, min(len(images), INSTANCES)).long()].split(500):
        network(part)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def forward_selection(features, labels):
    """Ranks (channels,), the first selected the highest."""
    centred = features - features.mean(0)
    within = (
        features
        - torch.stack([features[labels == label].mean(0) for label in labels.unique()])[
            torch.searchsorted(labels.unique(), labels)
        ]
    )
    w, t = within.T @ within, centred.T @ centred
    scale = t.diagonal().clone()
    ranks, open_ = torch.zeros(len(t), dtype=torch.float64), torch.ones(len(t), dtype=torch.bool)
    for place in range(len(t), 0, -1):
        ratio = w.diagonal() / t.diagonal()
        spent = t.diagonal() <= 1e-6 * scale  # constant, or a combination of those kept
        ratio = torch.where(open_, torch.where(spent, 2.0, ratio), torch.inf)
        best = int(ratio.argmin())
        ranks[best], open_[best] = place, False
        if not spent[best]:
            w = w - torch.outer(w[best], w[best]) / w[best, best].clamp(min=1e-30)
            t = t - torch.outer(t[best], t[best]) / t[best, best]
    return ranks


def scores(method, network, found, labels):
    modules = dict(network.named_modules())
    if method == "magnitude":
        return {name: modules[name].weight.detach().abs() for name in found}
    if method == "random":
        return {name: torch.rand(features.shape[1]) for name, features in found.items()}
    if method == "F":
        return {name: f_statistic(features, labels) for name, features in found.items()}
    return {name: forward_selection(features, labels) for name, features in found.items()}


def pruned(network, method, amount, images, labels):
    network = copy.deepcopy(network)
    found = activations(network, images)
    shown = labels[torch.linspace(0, len(images) - 1, min(len(images), INSTANCES)).long()]
    keep = {}
    for name, values in scores(method, network, found, shown).items():
        kept = max(round((1 - amount) * len(values)), 1)
        keep[name] = torch.zeros(len(values), dtype=torch.bool)
        keep[name][values.argsort(descending=True)[:kept]] = True
    slim(network, keep, images[:2])
    return network


def tensors(part, data):
    images, labels = part.__getitems__(torch.arange(len(part)))
    return data.normalize(images), labels


def results_of(path):
    lines = path.read_text().splitlines() if path.exists() else []
    return {(line["task"], line["seed"], line["method"], line["amount"]): line for line in map(json.loads, lines)}


def run(results, task, seed, network, train_set, test_set, fine_tune):
    for amount in AMOUNTS:
        for method in METHODS:
            if (task, seed, method, amount) in results_of(results):
                continue
            torch.manual_seed(1000 + seed)
            smaller = pruned(network, method, amount, *train_set)
            before = error(smaller, *test_set)
            train(smaller, *train_set, *fine_tune)
            line = {"task": task, "method": method, "amount": amount, "seed": seed}
            line |= {"at_once": before, "test_error": error(smaller, *test_set)}
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


def two_classes(images, labels, classes, count=None, seed=0):
    """Images of two classes, labelled 0 and 1; a sample of them if `count` is given."""
    index = torch.isin(labels, torch.tensor(classes)).nonzero().flatten()
    if count is not None:
        index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))[:count]]
    return images[index], (labels[index] == classes[1]).long()


def main(results, folder, *seeds):
    results = Path(results)
    digits, cifar = DigitsDataModule(val_size=0), ImageFolderDataModule(root=folder, val_size=0)
    for data in (digits, cifar):
        data.setup()
    digits_train, digits_test = tensors(digits.load_train(), digits), tensors(digits.load_test(), digits)
    cifar_train, cifar_test = tensors(cifar.load_train(), cifar), tensors(cifar.load_test(), cifar)
    for seed in map(int, seeds):
        torch.manual_seed(seed)
        network = models.resnet20(in_channels=1)
        train(network, *digits_train, 10, 0.1, 64, False)
        run(results, "digits", seed, network, digits_train, digits_test, (10, 0.05, 64, False))
        torch.manual_seed(seed)
        some = torch.randperm(len(cifar_train[0]))[:10_000]
        sample = cifar_train[0][some], cifar_train[1][some]
        network = models.resnet20()
        train(network, *sample, 6, 0.1, 128, True)
        run(results, "CIFAR-10", seed, network, sample, cifar_test, (3, 0.05, 128, True))
        for pair, classes in PAIRS.items():
            few = two_classes(*cifar_train, classes, 800, seed)
            tuned = copy.deepcopy(network)
            torch.manual_seed(seed)
            tuned.fc = torch.nn.Linear(tuned.fc.in_features, 2)
            train(tuned, *few, 3, 0.01, 64, True)  # the new head, before anything is ranked
            run(results, pair, seed, tuned, few, two_classes(*cifar_test, classes), (10, 0.02, 64, True))


def table(results):
    found = results_of(Path(results))
    columns = [(task, amount) for task in dict.fromkeys(task for task, *_ in found) for amount in AMOUNTS]
    rows = [
        f"| | {' | '.join(f'{task}, {100 * amount:g} %' for task, amount in columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for method in METHODS:
        cells = [
            [
                100 * line["test_error"]
                for key, line in found.items()
                if (key[0], key[2], key[3]) == (task, method, amount)
            ]
            for task, amount in columns
        ]
        rows.append(f"| {method} | {' | '.join(summary(cell) if cell else '–' for cell in cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(sys.argv[1]), end="") if len(sys.argv) == 2 else main(*sys.argv[1:])
