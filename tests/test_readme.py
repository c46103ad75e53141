"""Every example of the README runs."""

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from hydra import compose, initialize_config_module
from torch.nn import functional as F

from lightning_fscreen import ScreeningPruningCallback, find_gates, models
from tests.benchmarks.readme import digest, digest_of_picture, updated
from tests.conftest import loader, trainer

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def my_net():
    return models.resnet20(in_channels=1)


class MyModule(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = my_net()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Data(pl.LightningDataModule):
    num_classes = 10

    def train_dataloader(self):
        return loader(count=128)

    test_dataloader = train_dataloader


@pytest.mark.filterwarnings("ignore")
def test_the_python_blocks_run_one_after_another(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    halfway = trainer([ScreeningPruningCallback(amount=0.5, end_epoch=2)], max_epochs=2)
    halfway.fit(MyModule(), Data())
    halfway.save_checkpoint("last.ckpt")
    slim = trainer([ScreeningPruningCallback(amount=0.5, end_epoch=1)], max_epochs=2)
    slim.fit(MyModule(), Data())
    slim.save_checkpoint("best.ckpt")
    names = {
        "model": MyModule(), "datamodule": Data(), "MyNet": my_net, "MyModule": MyModule,
        "images": loader().dataset[:4][0], "dataloader": loader(count=128), "quiet": quiet, "torch": torch,
    }  # fmt: skip
    found = blocks("python")
    assert len(found) == 5
    for block in found:
        code = block.replace("Trainer(max_epochs=160", "Trainer(**quiet, max_epochs=4")
        code = code.replace("Trainer(callbacks", "Trainer(**quiet, callbacks")
        code = code.replace('"layer1.0.bn1"', "find_gates(net, images)[1].name")
        if "mask}" in code:
            gate = find_gates(names["net"], names["images"])[1]
            names["mask"] = torch.arange(gate.channels) < gate.channels - 1
        exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "net.onnx").exists() and (tmp_path / "model.safetensors").exists()


COMMANDS = [
    line.split("#")[0].split()
    for block in blocks("console")
    for line in block.splitlines()
    if line.startswith("fscreen") and "--help" not in line
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_commands_have_valid_overrides(command):
    program, *overrides = command
    single = [re.sub(r"=([^=,]*),.*", r"=\1", override) for override in overrides if override != "-m"]
    with initialize_config_module("lightning_fscreen.conf", version_base="1.3"):
        assert compose({"fscreen": "train", "fscreen-bench": "bench"}[program], overrides=single)


def test_the_tables_are_those_of_the_committed_results():
    assert README.count("<!-- results:") == README.count("<!-- end of results -->") >= 1
    assert updated(README) == README  # else: PYTHONPATH=. python tests/benchmarks/readme.py


def test_the_first_picture_was_made_of_the_committed_results():
    assert digest_of_picture() == digest()
