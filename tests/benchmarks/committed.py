"""The committed results: lines of `results/TABLE.jsonl` that belong to the tables of `conf/table` as they are now."""

from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from lightning_fscreen.cli.bench import runs_of
from lightning_fscreen.saving.lines import read_lines

RESULTS = Path(__file__).parent / "results"
EXTRA = {
    "blind_spots": [
        '+table.methods.means_alone=["callbacks.fscreen.criterion=tests.benchmarks.means_alone:means_alone"]'
    ]
}


@cache
def table_and_results(name):
    """A table, and the lines of its committed results."""
    with initialize_config_module("lightning_fscreen.conf", version_base="1.3"):
        table = OmegaConf.to_container(compose("bench", [f"table={name}", *EXTRA.get(name, [])]).table, resolve=True)
    commands = {run.command for run in runs_of(table)}
    return table, [line for line in read_lines(RESULTS / f"{name}.jsonl") if line["command"] in commands]
