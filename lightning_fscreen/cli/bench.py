"""`fscreen-bench`: the runs of a table, one after another or side by side, and the table that they make.

Every run is the command `fscreen` in a process of its own (forked from one that has imported everything, where the
system can); what it reports becomes one line of a JSON-lines file. Runs whose line is there already are not repeated,
so an interrupted table goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import lightning
import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

import lightning_fscreen
from lightning_fscreen.cli.run import main as fscreen
from lightning_fscreen.cli.tables import by_layer, curves, markdown, metric_of
from lightning_fscreen.files import replacing
from lightning_fscreen.saving.lines import read_lines

log = logging.getLogger(__name__)

_START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


@dataclass(frozen=True)
class Run:
    """One run of a table.

    Attributes:
        setting: label of the overrides that all methods have in common.
        method: label of the method.
        amount: fraction pruned; None where nothing is.
        seed: seed.
        overrides: the arguments of `fscreen`.
    """

    setting: str
    method: str
    amount: float | None
    seed: int
    overrides: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command that repeats it."""
        return " ".join(["fscreen", *self.overrides])


def runs_of(table: Mapping[str, Any]) -> Iterator[Run]:
    """All runs of a table, seed by seed, so that an unfinished one has few seeds rather than few methods.

    A method whose overrides take the callback away (`~callbacks.fscreen`, `callbacks=none`) has no amounts.
    """
    fixed = [f"experiment={table['experiment']}", *table["overrides"]]
    for seed in table["seeds"]:
        for (setting, common), (method, own) in itertools.product(table["settings"].items(), table["methods"].items()):
            overrides = [*fixed, *common, *own]
            dense = any(override in ("~callbacks.fscreen", "callbacks=none") for override in own)
            for amount in [None] if dense else table["amounts"]:
                chosen = [] if amount is None else [f"callbacks.fscreen.amount={amount}"]
                yield Run(setting, method, amount, seed, (*overrides, *chosen, f"seed={seed}"))


def run_one(run: Run, metric: str, extra: Sequence[str], threads: int) -> dict[str, Any]:
    """Run it in a process of its own; returns its line.

    Raises:
        RuntimeError: it failed, or its report has no such metric; shows the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        quiet = [
            "extras.print_config=false",
            "extras.print_report=false",
            "extras.figures=false",
            "extras.latency=false",
        ]
        said = Path(folder) / "said.txt"
        context: Any = multiprocessing.get_context(_START)
        context.set_forkserver_preload([__name__])
        arguments = [*run.overrides, *quiet, *extra, f"hydra.run.dir={folder}"]
        process = context.Process(target=_fscreen, args=(arguments, threads, said))
        process.start()
        process.join()
        if process.exitcode:
            text = said.read_text()[-4000:] if said.exists() else ""
            raise RuntimeError(f"{run.command} failed with exit status {process.exitcode}:\n{text}")
        report = json.loads((Path(folder) / "report.json").read_text())
    if metric not in report:
        raise RuntimeError(
            f"{run.command} reports no {metric}; a val_error needs images held out (data.val_size above 0), a "
            "test_error a test (no trainer.limit_test_batches=0)"
        )
    wanted = (metric, "candidates", "params", "macs", "layers", "seconds")
    return {
        "setting": run.setting,
        "method": run.method,
        "amount": run.amount,
        "seed": run.seed,
        **{key: report[key] for key in wanted if key in report},
        "command": run.command,
        "versions": {
            "lightning_fscreen": lightning_fscreen.__version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
    }


def _fscreen(arguments: Sequence[str], threads: int, said: Path) -> None:
    """The command `fscreen`, in this process; its output goes to a file."""
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    sys.argv = ["fscreen", *arguments]
    fscreen()


def missing_runs(table: Mapping[str, Any], results: Sequence[Mapping[str, Any]], only: Sequence[str] = ()) -> list[Run]:
    """Runs of the table that no line has the metric of.

    Args:
        table: the table.
        results: lines of its file.
        only: labels of methods; all if empty.

    Raises:
        ValueError: a label that the table does not have.
    """
    if unknown := set(only) - set(table["methods"]):
        raise ValueError(f"only={sorted(unknown)}: choose of {list(table['methods'])}")
    there = {result["command"] for result in results if metric_of(table) in result}
    return [run for run in runs_of(table) if run.command not in there and (not only or run.method in only)]


def run_table(table: Mapping[str, Any], path: Path, extra: Sequence[str], jobs: int, only: Sequence[str] = ()) -> None:
    """Run the missing runs, and add a line to the file for every run as it ends.

    Raises:
        RuntimeError: another process is running this table into this file (it would do the same runs twice); runs that
            failed, after all others have been tried.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    try:
        with FileLock(lock, timeout=0):
            _run_missing(table, path, extra, jobs, only)
    except Timeout as error:
        raise RuntimeError(
            f"another fscreen-bench is adding to {path} ({lock} is locked); wait for it, use jobs=2 for runs side by "
            "side, or another results=FOLDER"
        ) from error


def _run_missing(table: Mapping[str, Any], path: Path, extra: Sequence[str], jobs: int, only: Sequence[str]) -> None:
    metric = metric_of(table)
    todo = missing_runs(table, read_lines(path), only)
    failures = []
    threads = max((os.cpu_count() or 1) // jobs, 1)
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run_one, run, metric, extra, threads): run for run in todo}
        for count, future in enumerate(as_completed(futures), 1):
            try:
                line = future.result()
            except RuntimeError as error:
                log.error("%s", error)
                failures.append(futures[future].command)
                continue
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            error_rate = 100 * line[metric]
            log.info("%d of %d: %s → %.2f %%, %.0f s", count, len(todo), line["command"], error_rate, line["seconds"])
    if failures:
        raise RuntimeError("these runs failed (their output is above):\n" + "\n".join(failures))


def bench(config: DictConfig) -> None:
    """Run and render the table of a composed configuration."""
    table: dict[str, Any] = OmegaConf.to_container(config.table, resolve=True)  # type: ignore[assignment]
    path = Path(config.results) / f"{table['name']}.jsonl"
    if not config.render_only:
        run_table(table, path, list(config.extra), config.jobs, list(config.only))
    commands, metric = {run.command for run in runs_of(table)}, metric_of(table)
    results = [line for line in read_lines(path) if line["command"] in commands and metric in line]
    if not results:
        raise ValueError(f"{path} has no results of table {table['name']!r} yet; run it without render_only=true")
    text = markdown(table, results)
    for name, content in {path.stem: text, f"{path.stem}_layers": by_layer(table, results)}.items():
        with replacing(path.with_name(f"{name}.md")) as partial:
            partial.write_text(content)
    with replacing(path.with_suffix(".png")) as partial:
        curves(table, results).savefig(partial, format="png", dpi=150)
    log.info("\n%s", text)


def main() -> None:
    """Entry point of the command `fscreen-bench`."""
    hydra.main(version_base="1.3", config_path="pkg://lightning_fscreen.conf", config_name="bench")(bench)()


if __name__ == "__main__":
    main()
