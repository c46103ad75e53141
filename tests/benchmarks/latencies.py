"""Budgets of latency on a CPU: what was asked for, and what the slim network takes.

    PYTHONPATH=. python tests/benchmarks/latencies.py RESULTS.jsonl          # quiet machine; all threads
    PYTHONPATH=. python tests/benchmarks/latencies.py RESULTS.jsonl --table

Freshly initialised networks, ranked by magnitude. The slim network is measured here once more, in turns with the dense
one, independently of the measurement by which `prune` decides: the median of five measurements, each the shortest of
several blocks of calls, which is what the machine needs while nothing else disturbs it.
"""

import copy
import json
import re
import sys
import time
from pathlib import Path
from statistics import median

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


def run(name: str, batch_size: int, round_to: int, amount: float) -> dict[str, object]:
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
    for line in map(json.loads, results.read_text().splitlines()):
        wanted = 1 - line["amount"]
        cells = [line["network"], line["batch_size"], line["round_to"]]
        if "most" in line:
            rows.append(f"| {' | '.join(map(str, cells))} | | {wanted:.0%} | at most {line['most']:.0%} go | | | |")
            continue
        cells += [f"{line['before']:.1f} ms", f"{wanted:.0%}"]
        cells += [f"{line['left']:.1%}", f"{line['left'] / wanted - 1:+.1%}", f"{line['macs']:.0%}"]
        rows.append(f"| {' | '.join(map(str, cells))} | {line['seconds']:.0f} s |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Run what is missing, or print the table."""
    results = Path(sys.argv[1])
    if sys.argv[2:] == ["--table"]:
        print(table(results), end="")
        return
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(line["network"], line["batch_size"], line["round_to"], line["amount"]) for line in known}
    for case in CASES:
        if case not in done:
            line = run(*case)
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
