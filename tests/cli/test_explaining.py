"""`fscreen explain` against pruning the same network with the same arguments."""

import json
import re

import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from lightning_fscreen import prune
from lightning_fscreen.cli.explaining import explain_run
from lightning_fscreen.cli.filling import fit_to_data
from lightning_fscreen.cli.run import main
from lightning_fscreen.data import DigitsDataModule
from tests.cli.test_own import README
from tests.cli.test_run import composed
from tests.processes import run_command
from tests.test_readme import blocks

UNIT = ["experiment=digits_unit", "callbacks.fscreen.amount=0.5"]


def test_it_says_what_pruning_then_does_to_the_weights_of_a_checkpoint(tmp_path):
    patterns = "callbacks.fscreen.include=net.fc1"
    config = composed(*UNIT, "callbacks.fscreen.budget=macs", patterns, f"paths.output_dir={tmp_path}", "seed=3")
    data = DigitsDataModule(batch_size=64)
    data.setup("fit")
    fit_to_data(config, data)
    model = instantiate(config.model, _convert_="all").eval()
    with torch.no_grad():
        model.net.fc1.weight.mul_(torch.linspace(0, 1, 300)[:, None])
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "checkpoints" / "last.ckpt")
    config.ckpt_path = "last"
    explain_run(config)
    found = json.loads((tmp_path / "explanation.json").read_text())
    batches = [(data.normalize(images), labels) for images, labels in data.train_dataloader()]
    _, report = prune(model.net, batches, 0.5, bias="zero", include="fc1", progress=False)
    assert found["prediction"]["params"] == report.to_dict()["params"]
    assert found["prediction"]["macs"] == report.to_dict()["macs"]
    assert [(layer["name"], layer["kept"]) for layer in found["layers"]] == [("net.fc1", report.kept)]
    assert "left out by include" in found["not_pruned"]["net.fc2"]
    with Image.open(tmp_path / "figures" / "explanation.png") as picture:
        assert min(picture.size) > 300


def test_the_command_and_a_module_and_data_of_ones_own(tmp_path):
    (tmp_path / "my_module.py").write_text(blocks(README, "python")[0])
    own = ["model._target_=my_module.MyModule", "data._target_=my_module.MyData", "+model.width=32"]
    done = run_command(
        main, tmp_path, "explain", *UNIT, *own, "extras.figures=false", "hydra.run.dir=run", COLUMNS="80"
    )
    assert done.returncode == 0, done.stderr
    assert "with the weights before any training" in done.stdout
    assert re.search(r"net.0 +32 .* 16 ", done.stdout) and "16 of 32 units (50.00 %)" in done.stdout
    assert {"explanation.json", "fscreen.log"} <= {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("callbacks=none", ValueError, "nothing prunes"),
        ("ckpt_path=nowhere.ckpt", FileNotFoundError, "no checkpoint 'nowhere.ckpt'"),
        ("callbacks.fscreen.granularity=weight", ValueError, 'must be "unit" or "channel", got \'weight\''),
        ("callbacks.fscreen.criterion=taylor", ValueError, "'taylor' needs gradients"),
    ],
)
def test_what_cannot_be_is_refused(override, error, message, tmp_path):
    with pytest.raises(error, match=message):
        explain_run(composed(*UNIT, override, f"paths.output_dir={tmp_path}"))
    assert not list(tmp_path.iterdir())
