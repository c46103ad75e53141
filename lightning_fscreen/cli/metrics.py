"""metrics.csv: one that a resumed run goes on with."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import loggers
from lightning.pytorch.core.saving import save_hparams_to_yaml

from lightning_fscreen.files import replacing

Row = dict[str, Any]


class CSVLogger(loggers.CSVLogger):
    """Lightning's CSVLogger, except that the file of an earlier run stays until the first new row is written.

    :meth:`keep` says that this run goes on with it. Without, the first new row replaces the file.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsFile:
        """The file; in all processes but the first, something that does nothing."""
        if self._experiment is None:
            self._experiment = MetricsFile(Path(self.log_dir))  # type: ignore[assignment]
        return self._experiment  # type: ignore[return-value]

    def keep(self, count: int) -> None:
        """Go on behind the first `count` rows that the file has."""
        self.experiment.keep(count)


class MetricsFile:
    """Rows of metrics, in columns in alphabetical order.

    A row is appended; a new column rewrites the file beside its place, so that a kill leaves a whole one.

    Args:
        folder: where metrics.csv and hparams.yaml are; made if need be.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.csv"
        self.rows: list[Row] = []
        self._columns: list[str] = []
        self._written = 0

    def keep(self, count: int) -> None:
        """Go on behind the first `count` rows that the file has."""
        if self.path.is_file():
            lines = self.path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # the last one may have been cut off
            kept = list(csv.DictReader(whole))[:count]
            self.rows = [{name: value for name, value in row.items() if value} for row in kept]

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row; :meth:`save` writes it."""
        values = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
        self.rows.append(values | {"step": len(self.rows) if step is None else step})

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Write hyperparameters beside the metrics."""
        save_hparams_to_yaml(str(self.path.with_name("hparams.yaml")), params)

    def save(self) -> None:
        """Write the new rows."""
        new = self.rows[self._written :]
        if not new:
            return
        columns = sorted({*self._columns}.union(*self.rows if not self._written else new))
        if columns == self._columns:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, columns).writerows(new)
        else:
            with replacing(self.path) as partial, partial.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(self.rows)
        self._columns, self._written = columns, len(self.rows)
