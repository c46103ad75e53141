"""Budgets of parameters and multiply–adds on networks of torchvision, counted after slimming by torch's own counters.

    python tests/benchmarks/budgets.py RESULTS.jsonl [NETWORK ...]   # resumable: what is there is skipped
    python tests/benchmarks/budgets.py RESULTS.jsonl --table         # as Markdown

Freshly initialised networks, random scores (for which the costs of the units say which go), `granularity="unit"`, two
images. "missed": cost left minus budget, in percent of the dense cost, of the slim network as `FlopCounterMode` and
`numel` count it. "chosen in": processor seconds, on one thread, for the masks, the walk that prepares them included
(all but the capture). Where a budget cannot be met, the most that can go is named.
"""

import copy
import json
import re
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from lightning_fscreen.candidates.units import Units
from lightning_fscreen.costs.size import measure_size
from lightning_fscreen.ranking.per_cost import prune_to_cost

SIZES = {"vit_b_16": 224, "swin_t": 224}
NETWORKS = (
    "resnet18 resnet50 mobilenet_v2 efficientnet_b0 densenet121 shufflenet_v2_x1_0 regnet_y_400mf convnext_tiny "
    "vit_b_16 swin_t"
).split()
AMOUNTS = (0.3, 0.5, 0.7)
BUDGETS = ("params", "macs")


def count(net: nn.Module, x: torch.Tensor, budget: str) -> int:
    """Independently of the package."""
    if budget == "params":
        return sum(parameter.numel() for parameter in net.parameters())
    counter = FlopCounterMode(display=False)
    with counter:
        net.eval()(x)
    return counter.get_total_flops() // 2 // len(x)


def run(name: str, budget: str) -> list[dict[str, object]]:
    """All amounts of one network."""
    torch.manual_seed(0)
    net = getattr(models, name)()
    x = torch.randn(2, 3, *[SIZES.get(name, 64)] * 2)
    dense = count(net, x, budget)
    size = measure_size(net, ((x,), {}), len(x))
    results: list[dict[str, object]] = []
    for amount in AMOUNTS:
        own = copy.deepcopy(net)
        units = Units(own, None, None)
        units.learn(own, (x,), {})
        generator = torch.Generator().manual_seed(0)
        kept = {layer: torch.ones(len(each), dtype=torch.bool) for layer, each in units.units().items()}
        scores = {layer: torch.rand(mask.shape, generator=generator) for layer, mask in kept.items()}
        found: dict[str, object] = {"network": name, "budget": budget, "amount": amount, "dense": dense}
        begun = time.process_time()
        costs = units.costs(size, budget)
        walked = time.process_time()
        try:
            masks = prune_to_cost(scores, kept, costs, (1 - amount) * dense, dense, units=units.units())
        except ValueError as error:
            match = re.search(r"lower amount to ([\d.]+)", str(error))
            results.append(found | {"most": float(match[1])})
            continue
        chosen = time.process_time()
        units.slim(own, (x,), {}, masks)
        missed = 100 * (count(own, x, budget) / dense - (1 - amount))
        results.append(found | {"missed": missed, "walk": walked - begun, "choice": chosen - walked})
    return results


def table(results: list[dict[str, object]]) -> str:
    """Markdown: one row for each network and budget."""
    lines = [
        "| network | budget | dense | "
        + " | ".join(f"missed at {amount:.0%}" for amount in AMOUNTS)
        + " | chosen in |",
        "|---|---|---|" + "---|" * (len(AMOUNTS) + 1),
    ]
    for name in NETWORKS:
        for budget in BUDGETS:
            rows = [row for row in results if (row["network"], row["budget"]) == (name, budget)]
            if not rows:
                continue
            cells = [f"{row['missed']:+.3f} %" if "missed" in row else f"at most {row['most']:.1%} go" for row in rows]
            times = [row["walk"] + row["choice"] for row in rows if "choice" in row]
            slowest = f"{max(times):.1f} s" if times else ""
            millions = f"{rows[0]['dense'] / 1e6:.1f} M"
            lines.append(f"| {name} | {budget} | {millions} | " + " | ".join(cells) + f" | {slowest} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or print the table."""
    path, *names = sys.argv[1:]
    file = Path(path)
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if names == ["--table"]:
        print(table(results))
        return
    torch.set_num_threads(1)
    done = {(row["network"], row["budget"]) for row in results}
    for name in names or NETWORKS:
        for budget in BUDGETS:
            if (name, budget) not in done:
                with file.open("a") as output:
                    output.writelines(json.dumps(row) + "\n" for row in run(name, budget))


if __name__ == "__main__":
    main()
