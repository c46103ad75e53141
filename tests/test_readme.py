"""Every example of the documents runs, their links lead somewhere, their figures are those of the committed results."""

import json
import re
import shlex
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from torch import nn
from torch.nn import functional as F

import lightning_fscreen
from lightning_fscreen import ScreeningPruningCallback, find_gates
from lightning_fscreen.ranking.criteria import CRITERIA
from tests.benchmarks.committed import RESULTS
from tests.benchmarks.readme import DOCUMENTS, digest, digest_of_picture, updated
from tests.conftest import ONNX, loader, trainer
from tests.trained.test_sensitivities import accuracy

ROOT, PACKAGE = Path(__file__).parents[1], Path(lightning_fscreen.__file__).parent
README, EVIDENCE, MAP = ROOT / "README.md", ROOT / "tests" / "benchmarks" / "README.md", PACKAGE / "README.md"
OTHERS = ROOT / "CONTRIBUTING.md", ROOT / "conf" / "README.md"
ALL = {str(path.relative_to(ROOT)): path.read_text() for path in (README, EVIDENCE, MAP, *OTHERS)}
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def lines(language):
    """Lines of all such blocks of all documents, those that are continued joined."""
    found = "".join(block for text in ALL.values() for block in blocks(text, language))
    return found.replace("\\\n", " ").splitlines()


def my_net():
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


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
    halfway = trainer([ScreeningPruningCallback(amount=0.5, end_epoch=2)], max_epochs=2)
    halfway.fit(MyModule(), Data())
    halfway.save_checkpoint("last.ckpt")
    slim = trainer([ScreeningPruningCallback(amount=0.5, end_epoch=1)], max_epochs=2)
    slim.fit(MyModule(), Data())
    slim.save_checkpoint("best.ckpt")
    names = {
        "model": MyModule(), "datamodule": Data(), "MyNet": my_net, "MyModule": MyModule,
        "images": loader().dataset[:4][0], "loader": loader(count=128), "accuracy": accuracy, "quiet": QUIET,
        "torch": torch, "find_gates": find_gates,
    }  # fmt: skip
    found = blocks(README.read_text(), "python")
    assert len(found) == 5
    for block in found:
        code = block.replace("Trainer(max_epochs=160", "Trainer(**quiet, max_epochs=4")
        code = code.replace("Trainer(callbacks", "Trainer(**quiet, callbacks")
        code = code if ONNX else code.replace("torch.onnx.export", "(lambda *args, **kwargs: None)")
        code = code.replace('"layer1.0.bn1"', "find_gates(net, images)[1].name")
        if "mask}" in code:
            gate = find_gates(names["net"], names["images"])[1]
            names["mask"] = torch.arange(gate.channels) < gate.channels - 1
            names["optimizer"] = torch.optim.SGD(names["net"].parameters(), lr=0.1)
        exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "net.onnx").exists() == ONNX and (tmp_path / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", blocks(MAP.read_text(), "python"))
def test_the_extensions_in_the_map_run_and_prune_to_their_amount(block, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {"model": MyModule(), "datamodule": Data(), "quiet": QUIET}
    known = set(CRITERIA)
    imported = "from lightning.pytorch import Trainer\nfrom lightning_fscreen import ScreeningPruningCallback\n"
    exec(compile(imported + block.replace("Trainer(max", "Trainer(**quiet, max"), "README.md", "exec"), names)
    for name in set(CRITERIA) - known:
        del CRITERIA[name]
    if "callback" in names:
        report = names["callback"].report()
        assert report.kept == pytest.approx(0.5 * report.total, abs=1)


def commands():
    """Calls of `fscreen` and `fscreen-bench`, without variables and comments."""
    for line in lines("console"):
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            del words[0]
        if words and words[0].startswith("fscreen") and "--help" not in words:
            yield tuple(word for word in words if word != "explain")


@pytest.mark.parametrize("command", sorted(set(commands())), ids=" ".join)
def test_the_commands_have_valid_overrides(command):
    program, *overrides = command
    single = [re.sub(r"=([^=,]*),.*", r"=\1", override) for override in overrides if override != "-m"]
    with initialize_config_module("lightning_fscreen.conf", version_base="1.3"):
        assert compose({"fscreen": "train", "fscreen-bench": "bench"}[program], overrides=single)


def test_scripts_and_targets_in_commands_exist():
    text = "\n".join(lines("console"))
    scripts, targets = set(re.findall(r"python (\S+\.py)", text)), set(re.findall(r"^make (\S+)", text, re.MULTILINE))
    assert len(scripts) >= 8 and targets == {"demo", "test", "test-oldest", "lint"}
    assert all((ROOT / script).is_file() for script in scripts)
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    named = re.findall(r"\| `(tests/\S+\.py|\w+\.py)` \|$", EVIDENCE.read_text(), re.MULTILINE)
    assert len(named) >= 5 and all((ROOT / name).exists() or (EVIDENCE.parent / name).exists() for name in named)


def anchors(text):
    """Of the headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", ALL)
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)\s]+)\)", ALL[document])
    assert links
    for link in links:
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (ROOT / document).parent / path if path else ROOT / document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link


def test_the_map_has_every_module():
    rows = re.findall(r"^\| `([\w/.]+)` \|", MAP.read_text(), re.MULTILINE)
    folders = {row for row in rows if row.endswith("/")}
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    modules = {module for module in modules if not module.startswith(tuple(folders))}
    assert all((PACKAGE / folder).is_dir() or (ROOT / folder).is_dir() for folder in folders)
    assert len(rows) == len(set(rows)) and set(rows) - folders - {"__init__.py"} == modules


def test_the_readme_is_read_in_two_minutes():
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_tables_and_figures_are_those_of_the_committed_results(document):
    text = document.read_text()
    for kind in ("results", "figures"):
        assert text.count(f"<!-- {kind}:") == text.count(f"<!-- end of {kind} -->") >= 1
    assert not re.search(r"^<!-- figures:", text, re.MULTILINE)  # Markdown would take the line for HTML
    assert updated(text) == text  # else: PYTHONPATH=. python tests/benchmarks/readme.py


def test_the_evidence_has_all_committed_results():
    shown = set(re.findall(r"<!-- results: (\w+) -->", EVIDENCE.read_text()))
    assert {path.stem for path in RESULTS.glob("*.jsonl")} <= shown


def test_the_first_picture_was_made_of_the_committed_results():
    assert digest_of_picture() == digest()


def raw(table, **wanted):
    """Errors in % of the lines of a file that have these values."""
    found = map(json.loads, (RESULTS / f"{table}.jsonl").read_text().splitlines())
    return [100 * line["test_error"] for line in found if all(line[key] == value for key, value in wanted.items())]


@pytest.mark.parametrize(
    ("row", "column", "values"),
    [
        ("MNIST", 2, raw("lenet300", method="dense")),
        ("MNIST", 3, raw("lenet300", method="magnitude", amount=0.98)),
        ("MNIST, 1,000 images, 2,000 noise inputs", 2, raw("fusion", method="dense")),
        (
            "MNIST, 5,000 images, 2,000 noise inputs",
            4,
            raw("noisy_mnist", setting="n = 5,000", method="screening", amount=0.98),
        ),
        ("2,308 genes, 56 tumours", 2, raw("khan", method="dense")),
        ("XOR of three inputs", 4, raw("blind_spots", setting="XOR of three", method="screening", amount=0.98)),
        ("XOR of three inputs", 3, raw("blind_spots", setting="XOR of three", method="magnitude", amount=0.98)),
        ("CIFAR-10, ResNet-20, ten epochs", 3, raw("finetune", method="magnitude", amount=0.5)),
    ],
)
def test_the_overview_has_means_and_deviations_over_the_seeds(row, column, values):
    cells = next(line for line in README.read_text().splitlines() if line.startswith(f"| {row} |")).strip("| ")
    mean, deviation, number = re.fullmatch(r"([\d.]+) ± ([\d.]+)(?: \((\d)\))?", cells.split(" | ")[column]).groups()
    assert [float(mean), float(deviation)] == pytest.approx([np.mean(values), np.std(values, ddof=1)], abs=0.00501)
    assert int(number or 5) == len(values)


def test_the_oldest_versions_that_are_declared_are_those_that_are_tested():
    declared = dict(re.findall(r'"([a-z]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    tested = dict(re.findall(r"^([a-z]+)==([\d.]+)$", (ROOT / "tests/oldest.txt").read_text(), re.M))
    assert tested.keys() == {"torch", "torchvision", "lightning", "torchmetrics"}
    assert {name: f"{declared[name]}.0" for name in tested} == tested
