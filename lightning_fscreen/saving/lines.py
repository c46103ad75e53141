"""Results as a file of JSON lines, one for every run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_fscreen.files import replacing


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none if there is no file.

    Raises:
        ValueError: a line that is no JSON object; names it.
    """
    if not path.is_file():
        return []
    results = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            result = json.loads(line)
            if not isinstance(result, dict):
                raise ValueError("no object")
        except ValueError as error:  # of JSON, too
            raise ValueError(
                f"line {number} of {path} is no JSON ({error}); delete that line, and its run is repeated"
            ) from error
        results.append(result)
    return results


class Runs:
    """The metrics of runs; with a file, each is there as soon as it is known, and none is evaluated twice.

    Args:
        path: the file; None for none.

    Raises:
        ValueError: a file of another kind.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._lines = path, [] if path is None else read_lines(path)
        try:
            self._metrics = {str(line["run"]): float(line["metric"]) for line in self._lines}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} has lines without a run and its metric; give another file") from error

    def metric(self, run: str, evaluate: Callable[[], float], **about: Any) -> float:
        """The metric of a run.

        Args:
            run: what it is known by.
            evaluate: gives the metric.
            about: primitives, for those who read the file.

        Raises:
            FileNotFoundError: the folder of the file does not exist.
        """
        if run not in self._metrics:
            self._metrics[run] = evaluate()
            self._lines.append({"run": run, **about, "metric": self._metrics[run]})
            if self._path is not None:
                with replacing(self._path) as partial:
                    partial.write_text("".join(json.dumps(line) + "\n" for line in self._lines))
        return self._metrics[run]
