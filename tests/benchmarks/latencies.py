"""Budgets of latency on a CPU: what was asked for, and what the slim network takes.

    PYTHONPATH=. python tests/benchmarks/latencies.py RESULTS.jsonl          # quiet machine; all threads
    PYTHONPATH=. python tests/benchmarks/latencies.py RESULTS.jsonl --table

Freshly initialised networks, ranked by magnitude. The slim network is measured here once more, in turns with the dense
one, independently of the measurement by which `prune` decides: the median of five measurements, each the shortest of
several blocks of calls, which is what the machine needs while nothing else disturbs it. Every case is tried three
times, each from the start.
"""

import copy
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torchvision import models

from lightning_fscreen import Latency, prune
from lightning_fscreen import models as own_models
from lightning_fscreen.costs.latency import compare_latency

CASES = [
    (name, batch_size, round_to, amount)
    for name in ("resnet18", "resnet20", "vit")
    for batch_size, round_to in ((1, 1), (1, 8), (16, 8))
    for amount in (0.3, 0.5)
]

CALLS = 3


def run(name: str, batch_size: int, round_to: int, amount: float) -> dict[str, Any]:
    """One line."""
    torch.manual_seed(0)
    net = getattr(own_models if hasattr(own_models, name) else models, name)()
    side = 224 if name == "resnet18" else 32
    batches = [(torch.randn(4, 3, side, side), torch.randint(10, (4,))) for _ in range(2)]
    dense, begun = copy.deepcopy(net), time.perf_counter()
    options = {"criterion": "magnitude", "bias": "zero", "progress": False, "round_to": round_to}
    found = {"network": name, "batch_size": batch_size, "round_to": round_to, "amount": amount}
    try:
        _, report = prune(net, batches, amount, budget="latency", latency=Latency(batch_size), **options)
    except ValueError as error:
        return found | {"most": float(re.search(r"lower amount to ([\d.]+)", str(error))[1])}
    seconds, x = time.perf_counter() - begun, torch.randn(batch_size, 3, side, side)
    times = [compare_latency([dense, net], (x,), None, batch_size) for _ in range(5)]
    before, after = (median(each) for each in zip(*times, strict=True))
    found |= {"before": before, "left": after / before, "reported": report.latency.after / report.latency.before}
    return found | {"macs": report.after.macs / report.before.macs, "seconds": seconds}


def table(results: Path) -> str:
    """Markdown."""
    rows = [
        "| network | at once | round_to | dense | asked for | left | of it, missed | multiply–adds left | takes |",
        "|---" * 9 + "|",
    ]
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for case in CASES:
        own = [line for line in lines if _case(line) == case]
        refused, met = ([line for line in own if ("most" in line) == there] for there in (True, False))
        name, batch_size, round_to, amount = case
        wanted, cells = 1 - amount, [name, batch_size, round_to]
        if len(refused) > len(met):
            most = median(line["most"] for line in refused)
            rows.append(f"| {' | '.join(map(str, cells))} | | {wanted:.0%} | at most {most:.0%} go | | | |")
            continue
        dense, macs, seconds = (median(line[key] for line in met) for key in ("before", "macs", "seconds"))
        left = sorted(line["left"] for line in met)
        cells += [f"{dense:.1f} ms", f"{wanted:.0%}", f"{median(left):.1%} ({left[0]:.1%}–{left[-1]:.1%})"]
        cells += [f"{median(left) / wanted - 1:+.1%}", f"{macs:.0%}", f"{seconds:.0f} s"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows) + "\n"


def _case(line: dict[str, Any]) -> tuple[str, int, int, float]:
    return line["network"], line["batch_size"], line["round_to"], line["amount"]


def main() -> None:
    """Run what is missing, or print the table."""
    results = Path(sys.argv[1])
    if sys.argv[2:] == ["--table"]:
        print(table(results), end="")
        return
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = Counter(map(_case, known))
    for call in range(CALLS):
        for case in CASES:
            if done[case] <= call:
                line = run(*case)
                with results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(line, flush=True)


if __name__ == "__main__":
    main()
