"""All that is to be measured on the day an accelerator is there, in pieces of at most ten minutes.

    PYTHONPATH=. python tests/benchmarks/accelerator.py FOLDER [--data ROOT] [--minutes 9.5] [--once] [--miniature]

Finished pieces are lines of FOLDER/pieces.jsonl and are not repeated; a training that was stopped goes on from its last
epoch. `--once` runs one piece. The pieces:

- `tests`: the tests marked `cuda`;
- `steps/NETWORK/PRECISION/COMPILED`: milliseconds of a training step of a ResNet-50 (channels) and a ViT-B/16 (weights)
  without the callback, with it, while it gathers, with masks, and slim (channels only);
- `slim/NETWORK/PRECISION`: seconds and peak memory of slimming, beside the network and its optimizer;
- `speed/EXPERIMENT/COMPILED`: seconds of an epoch, to choose what the tables use;
- `table/EXPERIMENT/METHOD`: the paper's two CIFAR-10 tables, a training each: dense, CLS and network slimming.

ROOT holds CIFAR-10: `cifar-10-batches-py`, or images as ROOT/train/CLASS/*.jpg and ROOT/test/CLASS/*.jpg.

`--miniature` goes through the same code with tiny networks and images on whatever device there is: a test.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import VisionTransformer, resnet50, vit_b_16
from torchvision.models.resnet import BasicBlock, ResNet

from lightning_fscreen import ScreeningPruningCallback, slim

NETWORKS, PRECISIONS, COMPILED = ("resnet50", "vit_b_16"), ("32-true", "bf16-mixed"), ("eager", "compiled")
EXPERIMENTS = ("resnet164_cifar10", "densenet40_cifar10")
METHODS = {"cls": [], "network_slimming": ["method=network_slimming"]}  # amounts are those of the experiments
DENSE = ["callbacks=none", "model.scheduler.milestones=[0.5,0.75]"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Watch(Callback):
    """Layout and compilation of a network, and the time of its steps and epochs."""

    def __init__(self, compiled=False, miniature=False, path=None):
        self.compiled, self.miniature, self.path = compiled, miniature, path
        self.steps, self._start = [], 0.0

    def on_fit_start(self, trainer, pl_module):
        pl_module.net.to(memory_format=torch.channels_last)
        if self.compiled:
            pl_module.net.compile(backend="eager" if self.miniature else "inductor")

    def on_train_epoch_start(self, trainer, pl_module):
        self.steps.append([])
        self._epoch = now()

    def on_train_batch_start(self, *_):
        self._start = now()

    def on_train_batch_end(self, *_):
        self.steps[-1].append(now() - self._start)

    def on_train_epoch_end(self, trainer, pl_module):
        if self.path:
            Path(self.path).write_text(json.dumps({"epoch_seconds": now() - self._epoch}))


class Step(LightningModule):
    """Classification of the same random batch, which lies on the device."""

    def __init__(self, net, batch_size, size, steps):
        super().__init__()
        self.net, self._shape, self._steps = net, (batch_size, 3, size, size), steps

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def train_dataloader(self):
        images = torch.randn(self._shape, device=DEVICE).contiguous(memory_format=torch.channels_last)
        labels = torch.arange(len(images), device=DEVICE) % 10
        return DataLoader([(images, labels)] * self._steps, batch_size=None)


def now():
    """Seconds, after all that the device has to do."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def network(name, miniature):
    """A network, its batch size, the side of its images and the steps of an epoch."""
    if miniature:
        if name.startswith("vit"):
            return VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=10), 4, 16, 2
        return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10), 4, 32, 2
    return (vit_b_16 if name.startswith("vit") else resnet50)(num_classes=1000), 128, 224, 30


def steps(name, precision, compiled, miniature):
    """Median milliseconds of a step: one epoch warms up, the second gathers, the third has masks or is slim."""
    channels = name.startswith("resnet")
    arguments = {"granularity": "channel" if channels else "weight", "criterion": "screening_sum", "amount": 0.5}
    arguments |= {"schedule": "one_shot", "end_epoch": 2, "collect_every": 1}
    pruning = {"without": None, "masks": {"slim": False}} | ({"slim": {"slim": True}} if channels else {})
    found = {}
    for variant, own in pruning.items():
        seed_everything(0, verbose=False)
        net, batch_size, size, count = network(name, miniature)
        watch = Watch(compiled == "compiled", miniature)
        callbacks = [watch] if own is None else [watch, ScreeningPruningCallback(**arguments, **own)]
        trainer = Trainer(
            max_epochs=3, precision=precision, accelerator="auto", devices=1, callbacks=callbacks, **QUIET
        )
        gc.collect()  # a Trainer and its model know each other: the one before would count, too
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.fit(Step(net, batch_size, size, count))
        medians = [1000 * sorted(epoch)[len(epoch) // 2] for epoch in watch.steps]
        found[variant] = medians[2]
        if own is not None:
            found |= {"idle": medians[0], "gathering": medians[1]}
        found[f"{variant} peak GB"] = torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else None
    return found


def slimming(name, precision, miniature):
    """Seconds, and bytes beside what was there before as a share of the parameters'."""
    net, batch_size, size, _ = network(name, miniature)
    net = net.to(DEVICE, torch.float32 if precision == "32-true" else torch.bfloat16)
    parameter = next(net.parameters())
    images = torch.randn(batch_size, 3, size, size).to(parameter)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    net(images).sum().backward()
    optimizer.step()
    norms = {key: part for key, part in net.named_modules() if isinstance(part, nn.BatchNorm2d)}
    keep = {key: torch.arange(norm.num_features) % 2 == 0 for key, norm in norms.items()}
    total = sum(p.numel() * p.element_size() for p in net.parameters())
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = now()
    plan = slim(net, keep, images[:2], optimizers=optimizer)
    seconds = now() - start
    extra = (torch.cuda.max_memory_allocated() - before) / total if DEVICE == "cuda" else None
    return {"seconds": seconds, "extra": extra, "removed": sum(plan.removed.values())}


def training(experiment, own, epochs, compiled, options, folder):
    """The command of one training with `fscreen`."""
    data = [f"data.root={options.data}"]
    if options.miniature:
        data = [f"data.root={write_images(Path(options.folder))}", "data.batch_size=8"]
        data += ["model.net._target_=lightning_fscreen.models.resnet20"]
    if options.miniature or (Path(options.data) / "train").is_dir():  # else the files as they are distributed
        data += ["data=image_folder", f"data.val_size={4 if options.miniature else 5000}"]
        data += ["data.crop_padding=4", "data.horizontal_flip=true"]
    watch = "+callbacks.watch"
    return [
        *(sys.executable, "-m", "lightning_fscreen.cli", f"experiment={experiment}", *own, *data),
        *("data.on_device=true", "trainer.precision=bf16-mixed", f"trainer.max_epochs={epochs}", "seed=0"),
        *(f"{watch}._target_=tests.benchmarks.accelerator.Watch", f"{watch}.compiled={compiled == 'compiled'}"),
        *(f"{watch}.miniature={options.miniature}", f"{watch}.path={folder}/epoch.json"),
        *("extras.figures=false", "extras.latency=false", f"hydra.run.dir={folder}", "ckpt_path=last"),
    ]


def write_images(folder):
    """A tiny data set of two classes."""
    for part, name, index in itertools.product(("train", "test"), ("cat", "dog"), range(10)):
        path = folder / "images" / part / name / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(path)
    return folder / "images"


def pieces(options, done):
    """Names of the pieces and the commands, each made when it is its turn; the choice of a table is known then."""
    itself = [sys.executable, __file__, options.folder, *(["--miniature"] if options.miniature else [])]
    where = ["tests/test_cuda.py", "--collect-only"] if options.miniature else ["tests"]
    yield "tests", [sys.executable, "-m", "pytest", "-q", "-m", "cuda", *where]
    few = options.miniature
    networks, precisions, compilers = (
        list(choices)[:count] if few else list(choices)
        for choices, count in ((NETWORKS, 1), (PRECISIONS[::-1], 1), (COMPILED, 1))
    )
    for parts in itertools.product(networks, precisions, compilers):
        yield "/".join(("steps", *parts)), [*itself, "--piece", "steps", *parts]
    for precision in PRECISIONS[:1] if few else PRECISIONS:
        parts = ("resnet50", precision)
        yield "/".join(("slim", *parts)), [*itself, "--piece", "slimming", *parts]
    for experiment in EXPERIMENTS[: 1 if few else None]:
        for compiled in () if few else COMPILED:
            name = f"speed/{experiment}/{compiled}"
            yield name, training(experiment, DENSE, 3, compiled, options, folder_of(options, name))
        speed = {way: done.get(f"speed/{experiment}/{way}", {}).get("epoch_seconds", 1e9) for way in COMPILED}
        best = min(speed, key=speed.get)
        if not few:
            name = f"table/{experiment}/dense"
            yield name, training(experiment, DENSE, 160, best, options, folder_of(options, name))
        for method, own in list(METHODS.items())[: 1 if few else None]:
            name = f"table/{experiment}/{method}"
            yield name, training(experiment, own, 4 if few else 320, best, options, folder_of(options, name))


def folder_of(options, name):
    return Path(options.folder).absolute() / "runs" / name.replace("/", "-")


def run_piece(name, command, options):
    """Run it for so many minutes; its result, or None if it is to go on another time."""
    folder = folder_of(options, name)
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    with (folder / "said.txt").open("a") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment, start_new_session=True)
        try:
            code = process.wait(60 * options.minutes)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None if name.startswith("table/") else {"error": f"took more than {options.minutes} minutes"}
    text = (folder / "said.txt").read_text()
    if name == "tests":
        return {"exit status": code, "summary": text.strip().rpartition("\n")[2]}
    if code:
        return {"error": text[-2000:]}
    if name.startswith(("steps", "slim")):
        return json.loads(text.strip().rpartition("\n")[2])
    return json.loads((folder / "epoch.json").read_text()) | {
        "report": json.loads((folder / "report.json").read_text())
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--data", default="data")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--miniature", action="store_true")
    parser.add_argument("--piece", nargs="+")
    options = parser.parse_args()
    if options.piece:
        measure, *parts = options.piece
        print(json.dumps({"steps": steps, "slimming": slimming}[measure](*parts, options.miniature)))
        return
    path = Path(options.folder) / "pieces.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    done = {line["name"]: line["result"] for line in map(json.loads, lines)}
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    for name, command in pieces(options, done):
        while name not in done:
            result = run_piece(name, command, options)
            if result is not None:
                done[name] = result
                line = {"name": name, "device": device, "torch": torch.__version__, "result": result}
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            print(name, "goes on" if result is None else "failed" if "error" in result else "done", flush=True)
            if options.once:
                return


if __name__ == "__main__":
    main()
