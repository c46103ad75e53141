"""Put the tables of the committed results into the README, between its marks; tests/test_readme.py checks for drift.

PYTHONPATH=. python tests/benchmarks/readme.py
"""

import re
from pathlib import Path

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from lightning_fscreen.bench import load_results, runs_of
from lightning_fscreen.tables import markdown

ROOT = Path(__file__).parents[2]
README, RESULTS = ROOT / "README.md", ROOT / "tests" / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def rendered(name):
    """The table of that name, from its committed results."""
    with initialize_config_module("lightning_fscreen.conf", version_base="1.3"):
        table = OmegaConf.to_container(compose("bench", [f"table={name}"]).table, resolve=True)
    commands = {run.command for run in runs_of(table)}
    return markdown(table, [line for line in load_results(RESULTS / f"{name}.jsonl") if line["command"] in commands])


def updated(text):
    """The README with its tables as the results are now."""
    return BLOCK.sub(lambda block: f"{block[1]}{rendered(block[2])}{block[3]}", text)


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
