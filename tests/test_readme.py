"""Every example of the README runs, and its figures are those of the committed results."""

import math
import re
import statistics
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from hydra import compose, initialize_config_module
from torch.nn import functional as F

from lightning_fscreen import ScreeningPruningCallback, find_gates, models
from lightning_fscreen.tables import grouped, metric_of
from tests.benchmarks.readme import digest, digest_of_picture, table_and_results, updated
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


def errors(name):
    """Errors in % by method and amount, one for every seed."""
    table, results = table_and_results(name)
    return {(method, amount): values for (_, method, amount), values in grouped(results, metric_of(table)).items()}


def by_method(results):
    """Lines of results by method and amount."""
    lines = {}
    for line in results:
        lines.setdefault((line["method"], line["amount"]), []).append(line)
    return lines


def difference(name, first, second, amount):
    """Of two methods' mean errors, and its standard error."""
    groups = [errors(name)[method, amount] for method in (first, second)]
    means = [statistics.fmean(values) for values in groups]
    return means[0] - means[1], sum(statistics.variance(values) / len(values) for values in groups) ** 0.5


def decimals(*values):
    """Values to two decimals, without a minus before zero, joined as in prose."""
    *others, last = [f"{round(value, 2) + 0.0:.2f}" for value in values]
    return f"{', '.join(others)} and {last}"


def lenet_figures():
    held_out, test = (
        [difference(name, "screening (shrunken F)", "magnitude", amount) for amount in (0.957, 0.98, 0.99)]
        for name in ("lenet300_validation", "lenet300")
    )
    (a, held_out_errors), (b, test_errors) = zip(*held_out, strict=True), zip(*test, strict=True)
    yield f"magnitude, ahead by {statistics.fmean(a):.3f} points in the mean of the three amounts"
    yield (
        f"Screening minus magnitude is {decimals(*a)} points on the held-out images (standard errors "
        f"{decimals(*held_out_errors)}) and {decimals(*b)} on the test images ({decimals(*test_errors)})"
    )


def unit_figures():
    _, results = table_and_results("comparators_channel")
    lines = by_method(results)
    found = errors("comparators_channel")

    def parameters(*key):
        return f"{statistics.fmean(line['params']['after'] for line in lines[key]):,.0f}"

    def in_first_layer(*key):
        return f"{statistics.fmean(line['layers'][0]['kept'] for line in lines[key]):.0f}"

    def error(*key):
        return f"{statistics.fmean(found[key]):.2f} %"

    ranked, slimming = ("magnitude", 0.9), ("network slimming", 0.9)
    together, alike, random = ("magnitude", 0.7), ("magnitude by layer", 0.9), ("random", 0.9)
    assert in_first_layer(*slimming) == "1"
    yield (
        f"at 90 % magnitude leaves {in_first_layer(*ranked)} of its 300 units and {parameters(*ranked)} parameters of "
        f"{parameters('dense', None)}, network slimming one unit; every layer alike, {in_first_layer(*alike)} units "
        f"and {parameters(*alike)}."
    )
    yield (
        f"Nearest in size are all units ranked together at 70 % ({parameters(*together)} parameters, "
        f"{error(*together)}), by layer at 90 % ({parameters(*alike)}, {error(*alike)}) and random units at 90 % "
        f"({parameters(*random)}, {error(*random)})."
    )
    spreads = [
        abs(
            statistics.fmean(found["magnitude by layer", amount])
            - statistics.fmean(found["network slimming by layer", amount])
        )
        for amount in (0.7, 0.9)
    ]
    yield f"lie within {math.ceil(100 * max(spreads)) / 100:.2f} points of each other"


def digits_figures():
    _, results = table_and_results("digits_channel")

    def left(method):
        macs = [line["macs"] for line in by_method(results)[method, 0.9]]
        return f"{100 * statistics.fmean(count['after'] / count['before'] for count in macs):.0f} %"

    yield (
        f"of the multiply–adds Taylor leaves {left('Taylor')}, SNIP {left('SNIP')}, gradient {left('gradient')} and "
        f"every layer alike {left('magnitude by layer')}, screening {left('screening')}:"
    )


def fusion_figures():
    at_98, at_99_5 = (
        difference("fusion", "screening, all at once", "screening, λ = 0.25", amount)[0] for amount in (0.98, 0.995)
    )
    yield f"pruning all at once costs {at_98:.1f} points at 98 % and {at_99_5:.0f} at 99.5 %"


@pytest.mark.parametrize("figures", [lenet_figures, unit_figures, digits_figures, fusion_figures])
def test_the_figures_in_the_prose_are_those_of_the_committed_results(figures):
    for sentence in figures():
        assert sentence in " ".join(README.split())
