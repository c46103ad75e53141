"""Networks, modules and data of the user's own, and networks by their name in a library."""

import json
import logging
from importlib.metadata import entry_points

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate

from lightning_fscreen import load_slimmed
from lightning_fscreen.cli import bench
from lightning_fscreen.cli.filling import leave_out_unknown
from lightning_fscreen.cli.run import main, run
from lightning_fscreen.models.library import timm_classifier, torchvision_classifier
from tests.cli.test_run import CONF, QUIET, composed, fscreen
from tests.test_readme import blocks

README = (CONF / "README.md").read_text()


def test_the_documented_module_and_data_run_from_their_folder(tmp_path):
    (tmp_path / "my_module.py").write_text(blocks(README, "python")[0])
    (tmp_path / "my_conf" / "experiment").mkdir(parents=True)
    (tmp_path / "my_conf" / "experiment" / "mine.yaml").write_text(blocks(README, "yaml")[0])
    command = ["--config-dir", "my_conf", "experiment=mine", "callbacks.fscreen.granularity=weight", *QUIET]
    done = fscreen(tmp_path, *command, "hydra.run.dir=run")
    assert "my_module.MyModule takes no net, num_classes, optimizer" in done.stdout
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["candidates"]["total"] == 20 * 32 + 32 * 3 and report["train_size"] == 300
    assert abs(report["candidates"]["kept"] - 0.4 * report["candidates"]["total"]) <= 1
    layers = torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(32, 3)
    load_slimmed(torch.nn.Sequential(*layers), tmp_path / "run" / "model.safetensors")


def test_the_commands_are_installed():
    commands = {command.name: command for command in entry_points(group="console_scripts")}
    assert commands["fscreen"].load() is main and commands["fscreen-bench"].load() is bench.main


@pytest.mark.filterwarnings("ignore")
def test_a_network_of_timm_by_its_name(tmp_path):
    timm = pytest.importorskip("timm")
    short = ["trainer.max_epochs=2", "trainer.limit_train_batches=2", "data.batch_size=8", "logger=csv"]
    pruning = ["callbacks.fscreen.granularity=channel", "callbacks.fscreen.amount=0.5", "extras.print_report=false"]
    run(composed("model=timm", "model.name=resnet10t", *QUIET, *short, *pruning, f"paths.output_dir={tmp_path}"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["candidates"]["kept"] == report["candidates"]["total"] // 2 and not report["not_removed"]
    net = load_slimmed(timm.create_model("resnet10t", num_classes=10, in_chans=1), tmp_path / "model.safetensors")
    assert sum(parameter.numel() for parameter in net.parameters()) == report["params"]["after"]


def test_names_that_a_library_does_not_have():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="timm has no network named 'resnet18x'"):
        timm_classifier("resnet18x")
    with pytest.raises(ValueError, match="torchvision has no network named 'resnet18x'; choose one of .*'resnet18'"):
        torchvision_classifier("resnet18x")
    model = torchvision_classifier("squeezenet1_1", num_classes=7, optimizer=torch.optim.Adam)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_what_was_given_on_the_command_line_is_never_left_out(caplog):
    target = "model._target_=torch.nn.Identity"  # takes anything
    for overrides, left in ([target], True), (["model._target_=torch.nn.ReLU", "+model.wdith=3"], False):
        with initialize_config_module("lightning_fscreen.conf", version_base="1.3"):
            config = compose("train", overrides=overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        try:
            with caplog.at_level(logging.INFO):
                leave_out_unknown(config)
        finally:
            HydraConfig.instance().cfg = None
        assert ("num_classes" in config.model) == left
    assert "torch.nn.ReLU takes no net, num_classes, optimizer" in caplog.text
    with pytest.raises(Exception, match="wdith"):
        instantiate(config.model)
