"""Put the committed results into the README: the tables between its marks, and its first picture.

    PYTHONPATH=. python tests/benchmarks/readme.py

tests/test_readme.py checks that neither has drifted from the results.
"""

import hashlib
import re
import statistics
from pathlib import Path

from hydra import compose, initialize_config_module
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image

from lightning_fscreen.bench import load_results, runs_of
from lightning_fscreen.tables import by_layer, grouped, markdown
from tests.benchmarks import finetune, redundancy

ROOT = Path(__file__).parents[2]
README, RESULTS = ROOT / "README.md", ROOT / "tests" / "benchmarks" / "results"
PICTURE = ROOT / ".github" / "results.png"
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
SHOWN = ("noisy_mnist", "fusion")  # tables in the picture
EXTRA = {
    "blind_spots": [
        '+table.methods.means_alone=["callbacks.fscreen.criterion=tests.benchmarks.means_alone:means_alone"]'
    ]
}


def table_and_results(name):
    """A table, and the lines of its committed results."""
    with initialize_config_module("lightning_fscreen.conf", version_base="1.3"):
        table = OmegaConf.to_container(compose("bench", [f"table={name}", *EXTRA.get(name, [])]).table, resolve=True)
    commands = {run.command for run in runs_of(table)}
    return table, [line for line in load_results(RESULTS / f"{name}.jsonl") if line["command"] in commands]


def rendered(name):
    """The results as a table of Markdown: what a benchmark printed, or that of finetune.py or `fscreen-bench`."""
    if name.endswith("_layers"):
        return by_layer(*table_and_results(name.removesuffix("_layers")))
    if not (RESULTS / f"{name}.jsonl").exists():
        return (RESULTS / f"{name}.md").read_text()
    if name in ("finetune", "redundancy"):
        return {"finetune": finetune, "redundancy": redundancy}[name].table(RESULTS / f"{name}.jsonl")
    return markdown(*table_and_results(name))


def updated(text):
    """The README with its tables as the results are now."""
    return BLOCK.sub(lambda block: f"{block[1]}{rendered(block[2])}{block[3]}", text)


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
    README.write_text(updated(README.read_text()))
    draw().savefig(PICTURE, dpi=150, metadata={"Results": digest()})
