"""Error right after pruning a trained network in one call, without any training, beside Torch-Pruning's.

    PYTHONPATH=. python tests/benchmarks/one_call.py RESULTS.jsonl FOLDER SEED...  # resumable; after equal_cost.py
    PYTHONPATH=. python tests/benchmarks/one_call.py RESULTS.jsonl  # the table

The dense ResNet-20 of equal_cost.py, of its results RESULTS.jsonl in the same folder, loses 10, 30 or 50 % of its
multiply–adds. The first row is the default, ranked by errors of reconstruction; the others, by screening. "Zero" is
what masks alone give: what is pruned is zero. In the place of what Torch-Pruning removes there is nothing, either.
"""

import json
import sys
from pathlib import Path

import torch

from lightning_fscreen import models
from lightning_fscreen.cli.tables import summary
from tests.benchmarks.equal_cost import INSTANCES, error, images_of, lines_of, macs, ours, peer

LEFT = (0.9, 0.7, 0.5)
METHODS = {
    "what the others predict": ours(),
    "the same, ranked by screening": ours(criterion="screening"),
    "mean activation": ours(criterion="screening", bias="mean"),
    "shift": ours(criterion="screening", bias="fold"),
    "zero": ours(criterion="screening", bias="zero"),
    "Torch-Pruning, norms of groups": peer("GroupMagnitudeImportance"),
    "Torch-Pruning, scales": peer("BNScaleImportance", "BNScalePruner"),
}


def main(results, folder, *seeds):
    """Run what is missing."""
    results = Path(results)
    for seed in map(int, seeds):
        (images, labels), test_set = images_of(folder, seed)
        network = models.resnet20()
        checkpoint = results.absolute().with_name("equal_cost.work") / f"resnet20_{seed}.pt"
        network.load_state_dict(torch.load(checkpoint, weights_only=True))
        shown = torch.linspace(0, len(images) - 1, INSTANCES).long().split(500)
        dense = error(network, *test_set)
        done = {(line["seed"], line["method"], line["left"]) for line in lines_of(results)}
        for left, method in ((left, method) for left in LEFT for method in METHODS):
            if (seed, method, left) in done:
                continue
            batches = [(images[index], labels[index]) for index in shown]
            smaller = METHODS[method](network, left, batches)
            line = {"seed": seed, "method": method, "left": left, "macs": macs(smaller)}
            line |= {"dense": dense, "test_error": error(smaller, *test_set)}
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


def table(results):
    """Markdown."""
    lines = lines_of(Path(results))
    dense = {line["seed"]: 100 * line["dense"] for line in lines}
    rows = ["| in the place of what goes | " + " | ".join(f"{1 - left:.0%} pruned" for left in LEFT) + " |"]
    rows += ["|---" * (1 + len(LEFT)) + "|", f"| nothing goes | {' | '.join([summary(list(dense.values()))] * 3)} |"]
    for method in METHODS:
        cells = [[line for line in lines if (line["method"], line["left"]) == (method, left)] for left in LEFT]
        texts = [summary([100 * line["test_error"] for line in cell]) if cell else "–" for cell in cells]
        rows.append(f"| {method} | {' | '.join(texts)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(sys.argv[1]), end="") if len(sys.argv) == 2 else main(*sys.argv[1:])
