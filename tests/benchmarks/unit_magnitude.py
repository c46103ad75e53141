"""Which hidden units of a trained network can go? LeNet-300-100 on MNIST; 50,000 images train it, 10,000 others tell.

    PYTHONPATH=. python tests/benchmarks/unit_magnitude.py RESULTS.jsonl DATA SEED...

Compares the magnitude of a unit (norm of its incoming weights, of its outgoing ones, their product, the standard
deviation of its activation times the outgoing norm), F, Taylor and chance; how the two layers compare (as they are,
relative to the mean of the layer, LAMP, the same share of each); and what stands in for removed units: nothing, their
mean, or a ridge regression on the units that stay, from the Gram matrix of 10,000 images. Error in % right after the
removal and after three more epochs. Without SEED... it prints the table of what is there.
"""

import copy
import json
import statistics
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from torchvision.datasets import MNIST

from lightning_fscreen import models, slim
from lightning_fscreen.functional import f_statistic

TRAINED, TUNED, BATCH, RIDGE = 6, 3, 128, 1e-3
LAYERS = (("fc1", "fc2"), ("fc2", "fc3"))
AMOUNTS = (0.5, 0.7, 0.9)
COMPENSATIONS = ("zero", "mean", "ridge")
WAYS = {
    "incoming": ("LAMP",),
    "outgoing": ("LAMP",),
    "product": ("as it is", "by the mean", "LAMP", "same share"),
    "deviation · outgoing": ("by the mean", "LAMP", "same share"),
    "F": ("LAMP", "same share"),
    "Taylor": ("as it is", "LAMP"),
    "random": ("LAMP",),
}


def hidden(network, images):
    first = torch.relu(network.fc1(images))
    return first, torch.relu(network.fc2(first))


def train(network, images, labels, epochs, rate, generator):
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
            loss = F.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def scores_of(network, images, labels):
    """Score → one tensor for each hidden layer, relative to the layer's mean; "raw" ones as they are."""
    with torch.no_grad():
        activations = hidden(network, images)
    taylor = [torch.zeros(300), torch.zeros(100)]
    for rows in torch.arange(len(images)).split(BATCH):
        network.zero_grad()
        F.cross_entropy(network(images[rows]), labels[rows]).backward()
        for sums, (name, _) in zip(taylor, LAYERS, strict=True):
            layer = network.get_submodule(name)
            sums += ((layer.weight * layer.weight.grad).sum(1) + layer.bias * layer.bias.grad).abs().detach()
    weights = [(getattr(network, a).weight.detach(), getattr(network, b).weight.detach()) for a, b in LAYERS]
    incoming, outgoing = [a.norm(dim=1) for a, _ in weights], [b.norm(dim=0) for _, b in weights]
    deviation = [values.std(0) for values in activations]
    raw = {
        "incoming": incoming,
        "outgoing": outgoing,
        "product": [a * b for a, b in zip(incoming, outgoing, strict=True)],
        "deviation · outgoing": [a * b for a, b in zip(deviation, outgoing, strict=True)],
        "F": [f_statistic(values, labels, 10).float() for values in activations],
        "Taylor": taylor,
        "random": [torch.rand(300), torch.rand(100)],
    }
    ways = {
        "as it is": lambda values: values,
        "by the mean": lambda values: values / values.mean(),
        "LAMP": lamp,
        "same share": lambda values: values.argsort().argsort() / len(values),
    }
    scores = {f"{name}, {way}": [ways[way](values) for values in raw[name]] for name in raw for way in WAYS[name]}
    return scores, activations


def lamp(values):
    """Lee et al. 2021 (arXiv 2010.07611): relative to what is left of the layer once all smaller ones are gone."""
    ascending = values.square().sort()
    left = ascending.values.flip(0).cumsum(0).flip(0)
    return torch.empty_like(values).index_copy(0, ascending.indices, (ascending.values / left).sqrt())


def masks_of(scores, amount):
    """The lowest go, over both layers together; every layer keeps its best."""
    values = torch.cat(scores)
    cut = values.sort().values[round(amount * len(values))]
    return [(own >= cut) | (own == own.max()) for own in scores]


@torch.no_grad()
def without(network, masks, activations, compensation):
    network = copy.deepcopy(network)
    for (_, name), kept, values in zip(LAYERS, masks, activations, strict=True):
        layer, mean = network.get_submodule(name), values.mean(0)
        gone = layer.weight[:, ~kept].clone()
        if compensation == "ridge":
            centred = values - mean
            gram = centred[:, kept].T @ centred[:, kept]
            gram.diagonal().add_(RIDGE * gram.diagonal().mean())
            stand_in = torch.linalg.solve(gram, centred[:, kept].T @ centred[:, ~kept])  # (kept, gone)
            layer.weight[:, kept] += gone @ stand_in.T
            layer.bias -= gone @ (stand_in.T @ mean[kept])
        if compensation != "zero":
            layer.bias += gone @ mean[~kept]
    keep = {name: mask for (name, _), mask in zip(LAYERS, masks, strict=True)}
    slim(network, keep, torch.zeros(2, 784))
    return network


def run(seed, data):
    full = MNIST(data, train=True)
    pixels = ((full.data.float() / 255 - 0.1307) / 0.3081).flatten(1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pixels), generator=generator)
    training, held_out = order[:50_000], order[50_000:]
    images, labels = pixels[training], full.targets[training]

    @torch.no_grad()
    def error(network):
        wrong = network(pixels[held_out]).argmax(1) != full.targets[held_out]
        return round(100 * float(wrong.float().mean()), 2)

    torch.manual_seed(seed)
    network = models.lenet300_100()
    train(network, images, labels, TRAINED, 2e-3, generator)
    yield {"seed": seed, "dense": error(network)}
    scores, activations = scores_of(network, images[:10_000], labels[:10_000])
    for amount in AMOUNTS:
        for name, own in scores.items():
            masks = masks_of(own, amount)
            result = {"seed": seed, "amount": amount, "score": name, "kept": [int(mask.sum()) for mask in masks]}
            for compensation in COMPENSATIONS:
                smaller = without(network, masks, activations, compensation)
                result[compensation] = error(smaller)
                train(smaller, images, labels, TUNED, 1e-3, torch.Generator().manual_seed(seed))
                result[f"{compensation}, tuned"] = error(smaller)
            yield result


def table(path):
    """The committed results as Markdown."""
    results = [json.loads(line) for line in path.read_text().splitlines()]
    rows = {}
    for result in results:
        if "score" in result:
            score, way = result["score"].split(", ")
            rows.setdefault((result["amount"], score, way), []).append(result)
    columns = [*COMPENSATIONS, *(f"{name}, tuned" for name in COMPENSATIONS)]
    lines = ["| units gone | score | layers compare | " + " | ".join(columns) + " |", "|---" * (len(columns) + 3) + "|"]
    for (amount, score, way), runs in sorted(rows.items(), key=lambda row: row[0][0]):
        cells = [_spread([run[column] for run in runs]) for column in columns]
        lines.append(f"| {amount:.0%} | {score} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(values):
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


if __name__ == "__main__":
    path, data, seeds = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "", sys.argv[3:]
    for seed in seeds:
        for result in run(int(seed), data):
            with path.open("a") as file:
                file.write(json.dumps(result) + "\n")
    if not seeds:
        sys.stdout.write(table(path))
