"""Kill `fscreen` with SIGKILL at random moments, run the same command again, and compare files byte for byte.

    PYTHONPATH=. python tests/benchmarks/kill_fscreen.py [KILLS] [PROCESSES] [CIFAR]

Every training is killed again and again, between its first moment and its last, until it gets through; as many
trainings of every experiment as it takes for so many kills. In the end model.safetensors and metrics.csv must equal
those of the run that nobody killed, and report.json all but the seconds. CIFAR is a folder of
{train,test}/CLASS/*.jpg, of which resnet20_cifar10 and vit_cifar10 train two epochs on the first 60 images of every
class; without it, only the others are run.
"""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUIET = ["extras.print_config=false", "extras.print_report=false", "extras.figures=false", "extras.latency=false"]
COMMON = [*QUIET, "trainer.deterministic=true", "trainer.accelerator=cpu", "ckpt_path=last"]
TEXTS = ["trainer.max_epochs=4", "data.train_size=1000", "data.val_size=0.1"]
TEXTS += ["callbacks.fscreen.start_epoch=0", "callbacks.fscreen.end_epoch=2"]
EXPERIMENTS = {"digits_weight": [], "digits_channel": ["trainer.max_epochs=6"], "digits_unit": [], "textcls": TEXTS}
CIFAR = ["trainer.max_epochs=2", "data=image_folder", "data.crop_padding=4", "data.horizontal_flip=true"]


def start(folder, arguments):
    """The command, with all that it starts in a process group of its own."""
    folder.mkdir(exist_ok=True)
    with (folder / "said.txt").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "lightning_fscreen.cli", *arguments, f"hydra.run.dir={folder}"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=said,
            stderr=said,
            start_new_session=True,
        )


def starts(folder):
    """How often the loggers of a run have been made, which is when training begins."""
    return len(list(folder.glob("tensorboard/events*")))


def follow(folder, arguments, delay=None):
    """Run; kill everything `delay` seconds after training has begun. Returns the seconds, or None if killed."""
    before, began = starts(folder), None
    process = start(folder, arguments)
    while process.poll() is None:
        if began is None and starts(folder) > before:
            began = time.perf_counter()
        if began is not None and delay is not None and time.perf_counter() - began > delay:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None
        time.sleep(0.01)
    assert process.returncode == 0, (folder / "said.txt").read_text()[-4000:]
    return time.perf_counter() - began


def results(folder):
    """What must be equal."""
    report = json.loads((folder / "report.json").read_text())
    del report["seconds"]
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "metrics.csv")} | {"report": report}


def check_epochs(folder, epochs):
    """Every epoch has been logged once, by training and by validation."""
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    for name in ("train/loss", "val/loss"):
        assert [int(row["epoch"]) for row in rows if row[name]] == list(range(epochs)), (name, rows)


def compare(arguments, kills, seed=0, report=print):
    """Kill so often; raises AssertionError unless all trainings end the same."""
    rng, done, attempt = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        seconds = follow(whole, arguments)
        expected = results(whole)
        epochs = json.loads((whole / "report.json").read_text())["epochs"]
        check_epochs(whole, epochs)
        while done < kills:
            attempt += 1
            folder, moments, killed = Path(temporary) / f"killed-{attempt}", [], True
            while killed:
                # No more than asked for; and towards the end, where less is left than when it began.
                delay = rng.uniform(0, seconds) if done < kills else None
                killed = follow(folder, arguments, delay) is None
                if killed:
                    done += 1
                    moments.append(f"{delay:.1f} s")
            for name, value in results(folder).items():
                assert value == expected[name], (arguments, moments, name, value, expected[name])
            check_epochs(folder, epochs)
            said = f"killed after {', '.join(moments)} of {seconds:.1f} s" if moments else "not killed"
            report(f"{arguments[0]}: training {attempt}: {said}: equal", flush=True)
            shutil.rmtree(folder)
    return done


def excerpt(source, folder, count=60):
    """Links to the first images of every class."""
    for part, number in (("train", count), ("test", count // 4)):
        for name in sorted(path.name for path in (source / part).iterdir()):
            (folder / part / name).mkdir(parents=True)
            for image in sorted((source / part / name).iterdir())[:number]:
                (folder / part / name / image.name).symlink_to(image.resolve())
    return folder


def main(kills=30, processes=1, cifar=None):
    ddp = [f"trainer.devices={processes}", "trainer.strategy=ddp"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as temporary:
        experiments = dict(EXPERIMENTS)
        if cifar is not None:
            images = [*CIFAR, f"data.root={excerpt(Path(cifar), Path(temporary))}"]
            experiments["resnet20_cifar10"] = images
            experiments["vit_cifar10"] = [*images, "callbacks.fscreen.end_epoch=1"]
        for experiment, own in experiments.items():
            done = compare([f"experiment={experiment}", *own, *COMMON, *ddp], kills)
            print(f"{experiment}, {processes} process(es): {done} kills, files equal every time", flush=True)


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:] if argument.isdigit()]
    folders = [argument for argument in sys.argv[1:] if not argument.isdigit()]
    main(*(numbers or [30]), **({"cifar": folders[0]} if folders else {}))
