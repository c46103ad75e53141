"""Budgets of parameters and multiply–adds on networks of torchvision, counted after slimming by torch's own counters.

    python tests/benchmarks/budgets.py RESULTS.jsonl [NETWORK ...]      # resumable: what is there is skipped
    python tests/benchmarks/budgets.py RESULTS.jsonl --table            # as Markdown
    ROUND_TO=8 python tests/benchmarks/budgets.py RESULTS.jsonl [...]   # with round_to=8

Networks of torchvision and two of the paper, freshly initialised, random scores (for which the costs of the units say
which go), `granularity="unit"`, two images. "missed": cost left minus budget, in percent of the dense cost, of the slim
network as `FlopCounterMode` and `numel` count it. "chosen in": processor seconds, on one thread, for the masks, the
walk that prepares them included (all but the capture). Where a budget cannot be met, the most that can go is named.
With round_to, the most of each: "uneven" widths of linear and convolution layers, which pruning has changed and which
are no multiples; "whole" ones, which are none and which it has not changed (but for the 1 of depthwise convolutions);
and "idle", the share of the dense cost that stays for channels that nobody reads and that only make a width a multiple.
"""

import copy
import json
import os
import re
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from lightning_fscreen import models as own_models
from lightning_fscreen.candidates.costs import UnitCosts
from lightning_fscreen.candidates.units import Units
from lightning_fscreen.costs.size import measure_size
from lightning_fscreen.ranking.per_cost import prune_to_cost

SIZES = {"vit_b_16": 224, "swin_t": 224, "resnet164": 32, "densenet40": 32}
NETWORKS = (
    "resnet18 resnet50 mobilenet_v2 efficientnet_b0 densenet121 shufflenet_v2_x1_0 regnet_y_400mf convnext_tiny "
    "vit_b_16 swin_t resnet164 densenet40"
).split()
AMOUNTS = (0.3, 0.5, 0.7)
BUDGETS = ("params", "macs")
ROUND_TO = int(os.environ.get("ROUND_TO", "1"))


def count(net: nn.Module, x: torch.Tensor, budget: str) -> int:
    """Independently of the package."""
    if budget == "params":
        return sum(parameter.numel() for parameter in net.parameters())
    counter = FlopCounterMode(display=False)
    with counter:
        net.eval()(x)
    return counter.get_total_flops() // 2 // len(x)


def uneven(net: nn.Module, dense: nn.Module) -> dict[str, int]:
    """Widths that are no multiples: changed by pruning, and as they were."""
    found = {"uneven": 0, "whole": 0}
    before = dict(dense.named_modules())
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            for left, width in list(zip(layer.weight.shape, before[name].weight.shape, strict=True))[:2]:
                if left % ROUND_TO and (left, width) != (1, 1):
                    found["uneven" if left != width else "whole"] += 1
    return found


def idle(units: Units, masks: dict[str, torch.Tensor], costs: UnitCosts) -> float:
    """Cost of what only makes widths multiples."""
    (widths,) = units._widths().values()
    model, (kept, _) = costs._networks[""].model, widths.remaining(masks)
    return model.of(kept) - model.of(kept & (widths.live(masks)))


def run(name: str, budget: str) -> list[dict[str, object]]:
    """All amounts of one network."""
    torch.manual_seed(0)
    net = getattr(own_models if hasattr(own_models, name) else models, name)()
    x = torch.randn(2, 3, *[SIZES.get(name, 64)] * 2)
    dense = count(net, x, budget)
    size = measure_size(net, ((x,), {}), len(x))
    results: list[dict[str, object]] = []
    for amount in AMOUNTS:
        own = copy.deepcopy(net)
        units = Units(own, None, None, round_to=ROUND_TO, streams=True)
        units.learn(own, (x,), {})
        generator = torch.Generator().manual_seed(0)
        kept = {layer: torch.ones(len(each), dtype=torch.bool) for layer, each in units.units().items()}
        scores = {layer: torch.rand(mask.shape, generator=generator) for layer, mask in kept.items()}
        found: dict[str, object] = {"network": name, "budget": budget, "amount": amount, "dense": dense}
        begun = time.process_time()
        costs, blocks = units.costs(size, budget), units.blocks()
        walked = time.process_time()
        try:
            masks = prune_to_cost(scores, kept, costs, (1 - amount) * dense, dense, units=units.units(), blocks=blocks)
        except ValueError as error:
            match = re.search(r"lower amount to ([\d.]+)", str(error))
            results.append(found | {"most": float(match[1])})
            continue
        chosen = time.process_time()
        if ROUND_TO > 1:
            found |= {"idle": 100 * idle(units, masks, costs) / dense}
        units.slim(own, (x,), {}, masks)
        missed = 100 * (count(own, x, budget) / dense - (1 - amount))
        if ROUND_TO > 1:
            found |= uneven(own, net)
        results.append(found | {"missed": missed, "walk": walked - begun, "choice": chosen - walked})
    return results


def table(results: list[dict[str, object]]) -> str:
    """Markdown: one row for each network and budget."""
    lines = [
        "| network | budget | dense | "
        + " | ".join(f"missed at {amount:.0%}" for amount in AMOUNTS)
        + " | chosen in |"
        + (" uneven | whole | idle |" if ROUND_TO > 1 else ""),
        "|---|---|---|" + "---|" * (len(AMOUNTS) + (4 if ROUND_TO > 1 else 1)),
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
            line = f"| {name} | {budget} | {millions} | " + " | ".join(cells) + f" | {slowest} |"
            if ROUND_TO > 1:
                met = [row for row in rows if "missed" in row]
                line += f" {max(row['uneven'] for row in met)} | {max(row['whole'] for row in met)} |"
                line += f" {max(row['idle'] for row in met):.2f} % |"
            lines.append(line)
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
