"""A run that is stopped anywhere and resumed leaves the same files, byte for byte, as the one that was not."""

import csv
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint

from lightning_fscreen.cli.metrics import MetricsFile
from lightning_fscreen.cli.run import run
from tests.cli.test_run import CONF, QUIET, composed
from tests.data.test_folder import write
from tests.test_readme import blocks

EPOCHS = 4
# All that draws random numbers: batches, augmentation, dropout, and the criterion.
DIGITS = ["model.net._target_=tests.cli.test_resuming.net", "data.crop_padding=1", "callbacks.fscreen.criterion=random"]
FOLDER = [*DIGITS, "data=image_folder", "data.root=images", "data.batch_size=5", "data.horizontal_flip=true"]
CHANNEL = ["experiment=digits_channel", "model.net._target_=tests.cli.test_run.small_net"]
OWN = ["model._target_=my_module.MyModule", "data._target_=my_module.MyData"]


def net(in_features, num_classes):
    """A network with dropout, which takes fewer arguments than model=lenet300 has."""
    layers = torch.nn.Linear(in_features, 32), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(32, num_classes)
    return torch.nn.Sequential(torch.nn.Flatten(), *layers)


class Stopped(Exception):
    pass


class Stop(Checkpoint):
    """Stops a run in the middle of an epoch, or between its checkpoint and the logging of its metrics."""

    def __init__(self, epoch, middle):
        self.epoch, self.middle = epoch, middle

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.middle and (trainer.current_epoch, batch_idx) == (self.epoch, 1):
            raise Stopped

    def on_train_epoch_end(self, trainer, pl_module):
        if not self.middle and trainer.current_epoch == self.epoch:
            raise Stopped


def train(folder, *overrides):
    common = [*QUIET, f"trainer.max_epochs={EPOCHS}", "trainer.limit_train_batches=4", "trainer.accelerator=cpu"]
    others = ["logger=csv", "extras.print_report=false", "ckpt_path=last", f"paths.output_dir={folder}"]
    run(composed(*common, *others, *overrides))


def results(folder):
    report = json.loads((folder / "report.json").read_text())
    del report["seconds"]
    return report, *((folder / name).read_bytes() for name in ("metrics.csv", "model.safetensors"))


@pytest.mark.parametrize(
    ("overrides", "stops"),
    [
        (DIGITS, [(0, True), (2, True)]),  # before there is a checkpoint; while the window is open
        (DIGITS, [(1, False), (EPOCHS - 1, False)]),  # before the metrics; when nothing is left but the end
        ([*DIGITS, "data.num_workers=1", "data.horizontal_flip=true"], [(2, True)]),
        ([*CHANNEL, "trainer.limit_train_batches=2", "data.batch_size=16"], [(3, True)]),
        ([*FOLDER, "data.on_device=true"], [(2, True)]),
        (OWN, [(2, True)]),
    ],
    ids=["digits", "between", "workers", "channel", "on device", "own"],
)
def test_stopped_and_resumed_ends_the_same(overrides, stops, tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text(blocks((CONF / "README.md").read_text(), "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    if "data=image_folder" in overrides:
        for index in range(48):
            write(tmp_path / "images" / ("test", "train")[index % 3 > 0] / "ab"[index % 2] / f"{index}.png", seed=index)
    train(tmp_path / "whole", *overrides)
    torch.manual_seed(12345)
    folder = tmp_path / "stopped"
    for epoch, middle in stops:
        moment = [f"+callbacks.stop.epoch={epoch}", f"+callbacks.stop.middle={middle}"]
        with pytest.raises(Stopped):
            train(folder, *overrides, "+callbacks.stop._target_=tests.cli.test_resuming.Stop", *moment)
    train(folder, *overrides)
    assert results(folder) == results(tmp_path / "whole")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [int(row["epoch"]) for row in rows if row["train/loss"]] == list(range(EPOCHS))


def test_a_checkpoint_from_elsewhere_begins_a_new_file(tmp_path):
    train(tmp_path / "run", *DIGITS, "trainer.max_epochs=2")
    train(tmp_path / "again", *DIGITS, f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt")
    epochs = [int(row["epoch"]) for row in csv.DictReader((tmp_path / "again" / "metrics.csv").open())]
    assert sorted({*epochs}) == [2, 3, EPOCHS]


def rows(path):
    return [{name: value for name, value in row.items() if value} for row in csv.DictReader(Path(path).open())]


def test_rows_are_kept_without_the_one_that_was_cut_off(tmp_path):
    first = MetricsFile(tmp_path)
    for step in range(2):
        first.log_metrics({"a": torch.tensor(step + 0.5)}, step)
        first.save()
    first.log_metrics({"b": 7}, 2)  # a new column
    first.save()
    assert rows(first.path) == [{"a": "0.5", "step": "0"}, {"a": "1.5", "step": "1"}, {"b": "7", "step": "2"}]
    text = first.path.read_text()
    first.path.write_text(text[:-2])
    second = MetricsFile(tmp_path)
    second.keep(3)
    assert first.path.read_text() == text[:-2]  # untouched until there is something to write
    second.log_metrics({"b": 8}, 2)
    second.save()
    assert rows(first.path) == [{"a": "0.5", "step": "0"}, {"a": "1.5", "step": "1"}, {"b": "8", "step": "2"}]
