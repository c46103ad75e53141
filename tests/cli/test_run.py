"""The command line: every configuration, real runs in processes of their own, and what they leave behind."""

import csv
import json
import os
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import onnxruntime
import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.pytorch import Callback
from PIL import Image
from safetensors.torch import save_file

from lightning_fscreen import load_slimmed, models
from lightning_fscreen.cli.filling import fit_to_data
from lightning_fscreen.cli.parts import check_writable
from lightning_fscreen.cli.run import main, run
from lightning_fscreen.data import DigitsDataModule
from tests.conftest import ONNX
from tests.processes import run_command
from tests.test_channel_fit import residual_net

CONF = Path(__file__).parents[2] / "conf"
GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in CONF.iterdir() if folder.is_dir()
}
DEEP = ["resnet164_cifar10", "densenet40_cifar10"]  # take long; they compose like all others
QUIET = ["extras.print_config=false", "extras.figures=false", "extras.latency=false", "trainer.max_epochs=3"]


def fscreen(folder, *overrides, status=0):
    """Run the command in a process of its own, away from the checkout."""
    done = run_command(main, folder, *overrides, COLUMNS="120")
    assert done.returncode == status, done.stderr
    return done


def composed(*overrides):
    with initialize_config_module("lightning_fscreen.conf", version_base="1.3"):
        return compose("train", overrides=list(overrides))


def small_net():
    """Instead of a ResNet-20."""
    return residual_net()


def error_on_digits(net):
    data = DigitsDataModule()
    data.setup("test")
    wrong = total = 0
    for images, labels in data.test_dataloader():
        wrong += int((net(data.normalize(images)).argmax(1) != labels).sum())
        total += len(labels)
    return wrong / total


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The default run, shortened."""
    folder = tmp_path_factory.mktemp("run")
    done = fscreen(folder, "trainer.max_epochs=6", "hydra.run.dir=run", "seed=3")
    return folder / "run", done


def check_composed(config, options, data):
    """All parts can be made, for these data."""
    fit_to_data(config, data)
    for part in ("data", "model"):
        instantiate(config[part], _convert_="all")
    for part in ("callbacks", "logger"):
        for entry in config[part].values():
            instantiate(entry, _convert_="all")
    if not {"trainer=gpu", "trainer=ddp"} & set(options):
        instantiate(config.trainer, logger=False, _convert_="all")


def test_every_option_of_every_group_composes_and_instantiates(tmp_path):
    assert set(GROUPS) >= {
        "data", "model", "callbacks", "trainer", "logger", "paths", "extras", "experiment", "hparams_search", "debug",
    }  # fmt: skip
    data = DigitsDataModule()
    data.setup("fit")
    own = {"experiment"}, {"method"}  # an experiment chooses its data and model, and has a schedule not all methods fit
    for groups in (*own, GROUPS.keys() - set().union(*own) - {"hydra", "table"}):  # tables: test_bench.py
        # The first options of all groups together, then the second ones, and so on.
        for options in zip_longest(*([f"{group}={option}" for option in GROUPS[group]] for group in sorted(groups))):
            check_composed(composed(*filter(None, options), f"paths.output_dir={tmp_path}"), options, data)


def test_a_run_leaves_what_the_contract_says(finished):
    folder, done = finished
    report = json.loads((folder / "report.json").read_text())
    assert {
        "experiment", "seed", "granularity", "criterion", "screening_weight", "amount", "test_error", "candidates",
        "params", "macs", "layers",
    } <= set(report)  # fmt: skip
    assert (report["experiment"], report["seed"], report["granularity"]) == ("digits_weight", 3, "weight")
    candidates = report["candidates"]
    assert candidates["total"] == 64 * 300 + 300 * 100 + 100 * 10 == sum(layer["total"] for layer in report["layers"])
    assert candidates["kept"] == sum(layer["kept"] for layer in report["layers"])
    assert abs(candidates["kept"] - (1 - report["amount"]) * candidates["total"]) <= 1
    assert report["params"]["after"] < report["params"]["before"] == 50610
    assert report["macs"]["after"] < report["macs"]["before"] == 50200
    assert 0 < report["test_error"] < 0.5
    for name in ("schedule", "connections", "weights", "layers"):
        with Image.open(folder / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 300
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 6 and config["model"]["net"]["in_features"] == 64
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    sparsity = [float(row["fscreen/sparsity"]) for row in rows if row["fscreen/sparsity"]]
    assert len(sparsity) == 6 and sparsity[-1] == pytest.approx(report["amount"], abs=1e-4)
    for text in ("net.fc1", "test error", "digits_weight, seed 3"):
        assert text in done.stdout


def test_the_saved_model_loads_in_another_process_with_the_reported_test_error(finished):
    folder, _ = finished
    net = load_slimmed(models.lenet300_100(in_features=64), folder / "model.safetensors").eval()
    error = json.loads((folder / "report.json").read_text())["test_error"]
    assert error_on_digits(net) == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize(
    ("overrides", "check"),
    [
        (["callbacks.fscreen.amount=0.98"], lambda r: r["candidates"]["pruned_fraction"] > 0.9799),
        (["callbacks.fscreen.criterion=magnitude"], lambda r: r["criterion"] == "magnitude"),
        (["callbacks.fscreen.connections=exact"], lambda r: r["candidates"]["kept"] > 0),
        (["callbacks=none"], lambda r: r["params"]["before"] == r["params"]["after"] and r["layers"] == []),
        (["experiment=none", "callbacks.fscreen.granularity=weight"], lambda r: r["experiment"] is None),
        (["data.val_size=0"], lambda r: "val_error" not in r and r["train_size"] == 1497),
        (["logger=csv", "trainer.accelerator=cpu"], lambda r: r["test_error"] < 1),
        (["debug=fdr"], lambda r: r["layers"] != []),
        (["debug=limit"], lambda r: r["layers"] != []),
        (["debug=overfit"], lambda r: r["candidates"]["pruned_fraction"] == 0),
    ],
)
def test_overrides_take_effect(overrides, check, tmp_path):
    run(composed(*QUIET, *overrides, f"paths.output_dir={tmp_path}"))
    assert check(json.loads((tmp_path / "report.json").read_text()))


@pytest.mark.parametrize(
    "experiment", [name for name in GROUPS["experiment"] if name not in ("none", "textcls", "digits_channel", *DEEP)]
)
def test_every_experiment_goes_through_all_stages(experiment, tmp_path):
    short = ["data=digits", "data.batch_size=16", "debug=fdr"]
    short += ["model.net.patch=2"] if experiment == "convnext_cifar10" else []  # 8 × 8 pixels, halved twice
    short += ["model.net.size=8"] if experiment == "vit_cifar10" else []
    run(composed(f"experiment={experiment}", *short, f"paths.output_dir={tmp_path}"))
    report = json.loads((tmp_path / "report.json").read_text())
    total, kept = (report["candidates"][key] for key in ("total", "kept"))
    assert abs(kept - (1 - report["amount"]) * total) <= 1
    assert report["experiment"] is None or report["experiment"] == experiment
    if report["granularity"] == "channel":
        assert (
            report["params"]["after"] < report["params"]["before"]
            and report["macs"]["after"] < report["macs"]["before"]
        )


def test_a_run_on_texts_loses_heads_and_hidden_units_and_is_timed_and_exported_with_its_own_inputs(tmp_path):
    run(
        composed(
            "experiment=textcls",
            *QUIET,
            "callbacks.fscreen.start_epoch=0",
            "callbacks.fscreen.end_epoch=2",
            "data.train_size=300",
            "data.test_size=100",
            "extras.figures=true",
            "extras.latency=true",
            f"extras.export_onnx={ONNX}",
            f"paths.output_dir={tmp_path}",
        )
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert {layer["name"].split(".")[-1]: layer["kept"] < layer["total"] for layer in report["layers"]} == {
        "attention": True,
        "expand": True,
    }
    assert report["latency_ms"]["64"]["after"] > 0
    net, texts = models.text_transformer(), torch.randint(100, (3, 16))
    load_slimmed(net, tmp_path / "model.safetensors").eval()
    assert sum(p.numel() for p in net.parameters()) == report["params"]["after"]
    if ONNX:
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        (out,) = session.run(None, {session.get_inputs()[0].name: texts.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), net(texts).detach(), rtol=1e-4, atol=1e-5)


def test_a_channel_run_leaves_a_smaller_network_that_others_load(tmp_path):
    run(
        composed(
            "experiment=digits_channel",
            *QUIET,
            "+trainer.limit_train_batches=4",
            "extras.figures=true",
            "extras.latency=true",
            f"extras.export_onnx={ONNX}",
            f"paths.output_dir={tmp_path}",
        )
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["candidates"]["total"] == 688 and report["candidates"]["kept"] == 344
    assert sum(layer["kept"] for layer in report["layers"]) == 344 and not report["not_removed"]
    assert set(report["latency_ms"]) == {"1", "64"} and report["latency_ms"]["1"]["after"] > 0
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "channels.png", "layers.png", "schedule.png", "weights.png",
    }  # fmt: skip
    assert not ONNX or (tmp_path / "model.onnx").stat().st_size > 4 * report["params"]["after"]
    net = load_slimmed(models.resnet20(in_channels=1), tmp_path / "model.safetensors").eval()
    assert sum(p.numel() for p in net.parameters()) == report["params"]["after"]
    assert error_on_digits(net) == pytest.approx(report["test_error"], abs=1e-6)


def test_returns_the_optimized_metric_and_names_those_there_are(tmp_path):
    config = composed(*QUIET, f"paths.output_dir={tmp_path}", "optimized_metric=val/error")
    assert run(config) == pytest.approx(json.loads((tmp_path / "report.json").read_text())["val_error"], abs=1e-6)
    with pytest.raises(ValueError, match=r"optimized_metric='val/acc' was not logged; choose one of .*val/error"):
        run(composed(*QUIET, f"paths.output_dir={tmp_path}", "optimized_metric=val/acc"))


@pytest.mark.slow
def test_sweep_over_screening_weights(tmp_path):
    fscreen(tmp_path, "callbacks.fscreen.screening_weight=0,0.25,0.5", "hydra.sweep.dir=sweep", *QUIET, "-m")
    reports = [json.loads((tmp_path / "sweep" / str(job) / "report.json").read_text()) for job in range(3)]
    assert [report["screening_weight"] for report in reports] == [0, 0.25, 0.5]


def test_any_image_folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(("cat", "dog", "newt")):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(0, 60, (16, 16, 3), generator=generator, dtype=torch.uint8)
                noise[..., label] += 150
                Image.fromarray(noise.numpy()).save(tmp_path / "images" / part / name / f"{index}.jpg")
    folder = tmp_path / "run"
    root = f"data.root={tmp_path / 'images'}"
    run(composed("data=image_folder", root, "data.batch_size=6", *QUIET, f"paths.output_dir={folder}"))
    report = json.loads((folder / "report.json").read_text())
    assert report["layers"][0]["total"] == 3 * 16 * 16 * 300 and report["layers"][-1]["total"] == 100 * 3
    net = load_slimmed(models.lenet300_100(num_classes=3, in_features=768), folder / "model.safetensors")
    assert net(torch.zeros(1, 3, 16, 16)).shape == (1, 3)


class SaveRank(Callback):
    """Lets every process write down what it ends with."""

    def __init__(self, folder):
        self.folder = folder

    def teardown(self, trainer, pl_module, stage):
        if stage == "fit":
            save_file(dict(pl_module.named_parameters()), f"{self.folder}/rank-{trainer.global_rank}.safetensors")


@pytest.mark.slow
def test_two_processes_end_the_same(tmp_path):
    command = [
        *(sys.executable, "-m", "lightning_fscreen.cli"),
        "experiment=digits_unit",
        "trainer.devices=2",
        "trainer.strategy=ddp",
        "trainer.accelerator=cpu",
        "hydra.run.dir=first",
        "+callbacks.ranks._target_=tests.cli.test_run.SaveRank",
        "+callbacks.ranks.folder=first",
        "+trainer.limit_train_batches=4",
        *QUIET,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=300, check=True)
    ranks = [(tmp_path / "first" / f"rank-{rank}.safetensors").read_bytes() for rank in range(2)]
    assert ranks[0] == ranks[1]
    report = json.loads((tmp_path / "first" / "report.json").read_text())
    assert abs(report["candidates"]["kept"] - (1 - report["amount"]) * report["candidates"]["total"]) <= 1
    assert 0 <= report["test_error"] <= 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=mnist", "data.download=false", "data.root=nowhere"], "nowhere/MNIST/raw"),
        (["data=image_folder", "data.root=nowhere"], "nowhere"),
        (["callbacks.fscreen.end_epoch=9"], "end_epoch=9"),
        (["callbacks.fscreen.amount=1.2"], "amount"),
    ],
)
def test_bad_values_name_the_override(overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=message):
        run(composed(*QUIET, *overrides, f"paths.output_dir={tmp_path}/run"))


def test_a_run_folder_that_cannot_be_written_names_it_and_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/run' cannot be written .*hydra\.run\.dir="):
        check_writable(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("method", "granularity"),
    [(method, "weight") for method in GROUPS["method"] if method != "network_slimming"]
    + [(method, "channel") for method in ("network_slimming", "screening", "taylor", "snip", "soft")],
)
def test_every_comparator_prunes_the_digits_to_the_same_budget(tmp_path, method, granularity):
    experiment = [f"experiment=digits_{granularity}", f"method={method}", "callbacks.fscreen.amount=0.5"]
    short = ["trainer.max_epochs=4", "+trainer.limit_train_batches=4", "extras.print_report=false"]
    if granularity == "channel":
        short.append("model.net._target_=tests.cli.test_run.small_net")
    run(composed(*experiment, *QUIET, *short, f"paths.output_dir={tmp_path}"))
    report = json.loads((tmp_path / "report.json").read_text())
    candidates = report["candidates"]
    assert report["granularity"] == granularity
    assert candidates["total"] - candidates["kept"] == pytest.approx(0.5 * candidates["total"], abs=2)
    assert 0 <= report["test_error"] <= 1
    if granularity == "channel":
        assert report["params"]["after"] < report["params"]["before"]
