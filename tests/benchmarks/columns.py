"""A table of numbers and categories: numbers beside embeddings, most of them noise.

    PYTHONPATH=. python tests/benchmarks/columns.py RESULTS.jsonl SEED...  # resumable
    PYTHONPATH=. python tests/benchmarks/columns.py RESULTS.jsonl  # the table

The class is the largest of three sums of five numbers and what three categories of eight kinds each contribute. A
thousand rows train a network that reads the numbers, behind a batch norm, beside four learned features of each
category, for 30 epochs; half of them prune its weights. 5,000 rows test.
"""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fscreen import ScreeningPruningCallback
from lightning_fscreen.cli.tables import summary
from tests.benchmarks.equal_cost import lines_of
from tests.conftest import trainer

SETTINGS = {"200 columns of noise": 200, "no noise": 0}
METHODS = ("screening", "magnitude", "dense")
AMOUNTS = (0.9, 0.95, 0.98)
NUMBERS, CATEGORIES, KINDS, CLASSES = 5, 3, 8, 3
TRAINING, TEST, EPOCHS = 1000, 5000, 30


class Table(LightningModule):
    """Three layers behind numbers and embeddings; a batch is (numbers, kinds, labels)."""

    def __init__(self, numbers):
        super().__init__()
        self.norm = nn.BatchNorm1d(numbers)
        self.embeddings = nn.ModuleList(nn.Embedding(KINDS, 4) for _ in range(CATEGORIES))
        sizes = (numbers + 4 * CATEGORIES, 100), (100, 50), (50, CLASSES)
        first, second, last = (nn.Linear(*size) for size in sizes)
        self.layers = nn.Sequential(nn.Dropout(0.1), first, nn.ReLU(), second, nn.ReLU(), last)

    def forward(self, numbers, kinds):
        learned = [embedding(column) for embedding, column in zip(self.embeddings, kinds.T, strict=True)]
        return self.layers(torch.cat([*learned, self.norm(numbers)], 1))

    def training_step(self, batch, batch_idx):
        numbers, kinds, labels = batch
        return F.cross_entropy(self(numbers, kinds), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def generated(seed, noise):
    """Numbers (N, ·), kinds (N, 3) and labels (N,)."""
    rng = torch.Generator().manual_seed(seed)
    weights = torch.randn(NUMBERS, CLASSES, generator=rng)
    tables = torch.randn(CATEGORIES, KINDS, CLASSES, generator=rng)
    numbers = torch.randn(TRAINING + TEST, NUMBERS + noise, generator=rng)
    kinds = torch.randint(KINDS, (TRAINING + TEST, CATEGORIES), generator=rng)
    sums = numbers[:, :NUMBERS] @ weights + tables[torch.arange(CATEGORIES), kinds].sum(1)
    return numbers, kinds, sums.argmax(1)


@torch.no_grad()
def error_of(model, numbers, kinds, labels):
    return float((model.eval()(numbers, kinds).argmax(1) != labels).double().mean())


def trained(seed, noise, criterion, amount):
    """Test error after the last epoch."""
    columns = generated(seed, noise)
    seed_everything(seed, verbose=False)
    model, pruning = Table(NUMBERS + noise), []
    if amount:
        pruning = [ScreeningPruningCallback("weight", amount, criterion=criterion, labels=lambda batch: batch[2])]
    rows = TensorDataset(*(column[:TRAINING] for column in columns))
    trainer(pruning, max_epochs=EPOCHS).fit(model, DataLoader(rows, 64, shuffle=True))
    return error_of(model, *(column[TRAINING:] for column in columns))


def main(results, *seeds):
    """Run what is missing."""
    results = Path(results)
    runs = [
        {"setting": setting, "method": method, "amount": amount, "seed": int(seed)}
        for seed in seeds
        for setting in SETTINGS
        for method in METHODS
        for amount in (AMOUNTS if method != "dense" else (0.0,))
    ]
    for run in runs:
        if any(line | run == line for line in lines_of(results)):
            continue
        error = trained(run["seed"], SETTINGS[run["setting"]], run["method"], run["amount"])
        with results.open("a") as file:
            file.write(json.dumps(run | {"test_error": error}) + "\n")


def table(results):
    """Markdown."""
    lines = lines_of(Path(results))
    rows = [f"| | {' | '.join(f'{s}, {amount:.0%} pruned' for s in SETTINGS for amount in AMOUNTS)} |"]
    rows.append("|---" * (1 + len(SETTINGS) * len(AMOUNTS)) + "|")
    for method in METHODS:
        cells = []
        for setting, amount in ((setting, amount) for setting in SETTINGS for amount in AMOUNTS):
            key = {"setting": setting, "method": method, "amount": amount if method != "dense" else 0.0}
            cells.append(summary([100 * line["test_error"] for line in lines if line | key == line]))
        rows.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(sys.argv[1]), end="") if len(sys.argv) == 2 else main(*sys.argv[1:])
