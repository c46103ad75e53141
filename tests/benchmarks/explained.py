"""`explain` on every classification network of torchvision: is no layer left out, and does `prune` do what it says?

    PYTHONPATH=. python tests/benchmarks/explained.py RESULTS.jsonl [NETWORK ...]  # resumable: what is there is skipped
    PYTHONPATH=. python tests/benchmarks/explained.py RESULTS.jsonl --table        # as Markdown

Freshly initialised networks of up to 170 M parameters, two images of 64 × 64 (or what the network insists on), half of
the multiply–adds by magnitude, which is said for a copy and then done. "Unexplained" are modules with parameters of
their own of which neither they nor a parameter is listed; "otherwise" the layers of which prune keeps another number
than it was said to, or another total of parameters or multiply–adds.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from torchvision import models

from lightning_fscreen import explain, prune
from tests.benchmarks.equal_cost import lines_of
from tests.benchmarks.torchvision_models import build, build_on_meta

LARGEST = 170_000_000
SIZES = {"inception_v3": 299, "googlenet": 96, "alexnet": 96}
ARGUMENTS = {"amount": 0.5, "criterion": "magnitude", "bias": "zero", "progress": False}


def size_of(name):
    """Images of 224 where positions are counted or windows laid out."""
    return SIZES.get(name, 224 if name.startswith(("vit", "swin", "maxvit")) else 64)


def explained(name):
    """One line of results."""
    torch.manual_seed(0)
    network, images = build(name).eval(), torch.randn(2, 3, size_of(name), size_of(name))
    batches = [(images, torch.tensor([0, 1]))]
    said = explain(copy.deepcopy(network), images, dataloader=batches, **ARGUMENTS)
    listed = {layer.name for layer in said.layers} | set(said.not_pruned)
    own = {name: dict(module.named_parameters(name, recurse=False)) for name, module in network.named_modules()}
    unexplained = [name for name, parameters in own.items() if parameters and not listed & {name, *parameters}]
    _, report = prune(network, batches, **ARGUMENTS)
    predicted = said.prediction.report
    kept = [{layer.name: layer.kept for layer in each.layers} for each in (predicted, report)]
    otherwise = [name for name in kept[0] | kept[1] if kept[0].get(name) != kept[1].get(name)]
    otherwise += ["total"] if predicted.after != report.after else []
    return {
        "network": name,
        "layers": len(said.layers),
        "not_pruned": len(said.not_pruned),
        "unexplained": unexplained,
        "otherwise": otherwise,
        "params": [report.before.params, report.after.params],
        "macs": [report.before.macs, report.after.macs],
    }


def main(results, *names):
    """Run what is missing."""
    results = Path(results)
    done = {line["network"] for line in lines_of(results)}
    for name in names or models.list_models(module=models):
        if name in done or sum(each.numel() for each in build_on_meta(name).parameters()) > LARGEST:
            continue
        line = explained(name)
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


def table(results):
    """Markdown."""
    lines = lines_of(Path(results))
    rows = ["| network | layers pruned | not pruned | unexplained | otherwise | multiply–adds left |", "|---" * 6 + "|"]
    for line in lines:
        before, after = line["macs"]
        counts = [line["layers"], line["not_pruned"], len(line["unexplained"]), len(line["otherwise"])]
        rows.append(f"| {line['network']} | {' | '.join(map(str, counts))} | {after / before:.1%} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(sys.argv[1]), end="") if sys.argv[2:] == ["--table"] else main(*sys.argv[1:])
