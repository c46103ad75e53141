"""Put the committed results into the documents: tables and sentences between their marks, and the first picture.

    PYTHONPATH=. python tests/benchmarks/readme.py

tests/test_readme.py checks that nothing has drifted from the results. `<!-- results: NAME -->` is followed by a table,
`<!-- figures: NAME -->` by a sentence of prose.py.
"""

import hashlib
import re
import statistics
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from lightning_fscreen.cli.tables import by_layer, grouped, markdown, summary
from tests.benchmarks import columns, equal_cost, finetune, in_one_fit, one_call, redundancy, unit_magnitude
from tests.benchmarks.committed import RESULTS, table_and_results
from tests.benchmarks.prose import FIGURES, default_of, finetuned

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", ROOT / "tests" / "benchmarks" / "README.md")
PICTURE = ROOT / ".github" / "results.png"
TABLE = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
FIGURE = re.compile(r"(<!-- figures: (\w+) -->).*?(<!-- end of figures -->)", re.DOTALL)
SHOWN = ("noisy_mnist", "fusion")  # tables in the picture
# The overview: the tasks, and where their results are, by table and setting; a row for 98 % of the weights each.
OVERVIEW = {
    "MNIST": ("lenet300", ""),
    "MNIST, 1,000 images, 2,000 noise inputs": ("noisy_mnist", "n = 1,000"),
    "MNIST, 5,000 images, 2,000 noise inputs": ("noisy_mnist", "n = 5,000"),
    "2,308 genes, 56 tumours": ("khan", ""),
    "XOR of two inputs": ("blind_spots", "XOR"),
    "XOR of three inputs": ("blind_spots", "XOR of three"),
    "concentric shells": ("blind_spots", "shells"),
    "handwritten digits of random sign": ("blind_spots", "flipped digits"),
    "pairs of inputs beside single ones": ("blind_spots", "pairs"),
}
RESNET = (("dense", None), ("magnitude", 0.5))
DENSE = {("noisy_mnist", "n = 1,000"): ("fusion", "")}  # run for another table


def rendered(name):
    """The results as a table of Markdown: what a benchmark printed, or that of finetune.py or `fscreen-bench`."""
    if name == "overview":
        return overview()
    if name.endswith("_layers"):
        return by_layer(*table_and_results(name.removesuffix("_layers")))
    if not (RESULTS / f"{name}.jsonl").exists():
        return (RESULTS / f"{name}.md").read_text()
    modules = (columns, equal_cost, finetune, in_one_fit, one_call, redundancy, unit_magnitude)
    scripts = {module.__name__.rpartition(".")[2]: module for module in modules}
    if name in scripts:
        return scripts[name].table(RESULTS / f"{name}.jsonl")
    return markdown(*table_and_results(name))


def overview():
    """The default beside magnitude and the dense network, on everything that was tried, at one share of the weights."""
    rows = ["| data | pruned | dense | magnitude | screening |", "|---" * 5 + "|"]
    for task, (name, setting) in OVERVIEW.items():
        dense = _cell(*DENSE.get((name, setting), (name, setting)), "dense", None)
        pruned = [_cell(name, setting, method, 0.98) for method in ("magnitude", default_of(name))]
        rows.append(f"| {' | '.join([task, '98 % of the weights', dense, *pruned])} |")
    dense, pruned = (_summary([line["test_error"] for line in finetuned(*key)]) for key in RESNET)
    rows.append(f"| CIFAR-10, ResNet-20, ten epochs | 50 % of the channels | {dense} | {pruned} | the same |")
    return "\n".join(rows) + "\n"


def _cell(name, setting, method, amount):
    _, results = table_and_results(name)
    key = setting, method, amount
    return _summary([r["test_error"] for r in results if (r["setting"], r["method"], r["amount"]) == key])


def _summary(errors):
    """Mean ± standard deviation in %, and the number of seeds where it is not five."""
    number = "" if len(errors) in (0, 5) else f" ({len(errors)})"
    return summary([100 * error for error in errors]) + number


def updated(text):
    """A document with its tables and figures as the results are now."""
    text = TABLE.sub(lambda block: f"{block[1]}{rendered(block[2])}{block[3]}", text)
    return FIGURE.sub(lambda block: f"{block[1]}{FIGURES[block[2]]()}{block[3]}", text)


def digest():
    """Of the results in the picture."""
    return hashlib.sha256(b"".join((RESULTS / f"{name}.jsonl").read_bytes() for name in SHOWN)).hexdigest()


def digest_of_picture():
    """Of the results that the picture was made of."""
    with Image.open(PICTURE) as image:
        return image.text["Results"]


def draw():
    """Left: with and without irrelevant inputs; right: error against weights kept."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    _, results = table_and_results("noisy_mnist")
    groups = grouped(results)
    methods = {"screening": "C0", "magnitude": "C3", "sum (paper)": "C7"}
    settings = ["n = 1,000", "n = 1,000, no noise", "n = 5,000", "n = 5,000, no noise"]
    labels = [
        "1,000 images,\n2,000 irrelevant inputs",
        "1,000 images",
        "5,000 images,\n2,000 irrelevant inputs",
        "5,000 images",
    ]
    for place, (method, color) in enumerate(methods.items()):
        values = [groups[setting, method, 0.98] for setting in settings]
        at = [index + 0.22 * (place - 1) for index in range(len(settings))]
        left.errorbar(
            at,
            [*map(statistics.fmean, values)],
            [*map(statistics.stdev, values)],
            fmt="o",
            color=color,
            capsize=3,
            label=method,
        )
    left.set_xticks(range(len(settings)), labels, fontsize=8)
    left.set_ylim(0)
    left.set_ylabel("test error [%]")
    left.set_title("98 % of the weights pruned", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    table, results = table_and_results("fusion")
    groups = grouped(results)
    for method, color in {"screening, λ = 0.25": "C0", "magnitude": "C3", "sum (paper), λ = 0.25": "C7"}.items():
        values = [groups[("", method, amount)] for amount in table["amounts"]]
        kept = [100 * (1 - amount) for amount in table["amounts"]]
        right.errorbar(
            kept, [*map(statistics.fmean, values)], [*map(statistics.stdev, values)], marker="o", color=color, capsize=3
        )
    dense = statistics.fmean(groups["", "dense", None])
    right.axhline(dense, color="black", ls="--", lw=1)
    right.annotate("dense network", (5, dense), textcoords="offset points", xytext=(0, 4), ha="right", fontsize=8)
    right.set_xscale("log")
    right.set_xticks(kept, [f"{value:.3g}" for value in kept])
    right.minorticks_off()
    right.set_xlabel("weights kept [%]")
    right.set_title("1,000 images, 2,000 irrelevant inputs", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(updated(document.read_text()))
    draw().savefig(PICTURE, dpi=150, metadata={"Results": digest()})
