"""Kill trainings with SIGKILL, resume them, and compare them bit by bit with the uninterrupted ones.

    python tests/benchmarks/kill.py [channel|weight] [KILLS] [PROCESSES]

Every training is killed once in each phase (while statistics are gathered, while it prunes, slims, fine-tunes and
writes a checkpoint), in a random order, and goes on from the last checkpoint every time; as many trainings as
it takes for so many kills. Two processes train with DDP; both are killed. Deterministic algorithms, one thread each.
"""

import os
import random
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_fscreen import ScreeningPruningCallback
from tests.conftest import ConvNet, trainer
from tests.saving.test_checkpoints import Batches, Scheduled, equal, momentum, state_of
from tests.test_channel_fit import residual_net

EPOCHS, END = 5, 3
PHASES = ("statistics", "pruning", "slimming", "checkpoint", "fine-tuning")
LONGEST = 0.05  # seconds from the beginning of a phase to the kill; slimming and checkpoints take as long or longer


class Pruning(ScreeningPruningCallback):
    """Tells the parent when a phase begins."""

    def __init__(self, say, **arguments):
        super().__init__(**arguments)
        self.say = say

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.say("fine-tuning" if self.fine_tuning else "statistics")
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_epoch_end(self, trainer, pl_module):
        self.say("pruning")
        super().on_train_epoch_end(trainer, pl_module)

    def _slim(self, trainer):
        self.say("slimming")
        super()._slim(trainer)


class Saver(ModelCheckpoint):
    def __init__(self, say, folder, **when):
        super().__init__(dirpath=folder, filename="{epoch}-{step}", save_last=True, save_top_k=-1, **when)
        self.say = say
        self.CHECKPOINT_NAME_LAST = f"last-{next(iter(when))}"

    def _save_checkpoint(self, trainer, filepath):
        self.say("checkpoint")
        super()._save_checkpoint(trainer, filepath)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        # Lightning 2.6 resumes from a checkpoint that is made by steps after the last batch of an epoch, but the next
        # checkpoint of the resumed training then says that its epoch has not begun.
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class Slowly(Callback):
    """So that a kill can fall between two steps."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        time.sleep(0.01)


class Part(Batches):
    """Every second batch, in a training of two processes."""

    def __init__(self, rank, processes):
        super().__init__(16)
        self.rank, self.processes = rank, processes

    def __iter__(self):
        for images, labels in super().__iter__():
            yield images[self.rank :: self.processes], labels[self.rank :: self.processes]


def train(granularity, folder, say, rank, processes):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    net, amount = (residual_net(), 0.5) if granularity == "channel" else (ConvNet(), 0.98)
    model = Scheduled(net, momentum)
    callback = Pruning(say, granularity=granularity, amount=amount, end_epoch=END)
    options = {"strategy": "ddp", "devices": processes} if processes > 1 else {}
    savers = [Saver(say, folder, every_n_train_steps=1), Saver(say, folder, save_on_train_epoch_end=True)]
    run = trainer([callback, *savers, Slowly()], max_epochs=EPOCHS, enable_checkpointing=True, **options)
    checkpoint = max(folder.glob("last-*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)
    run.fit(model, Part(rank, processes), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    torch.save(state_of(model, callback, run), folder / f"final-{rank}.pt")


def start(granularity, folder, processes):
    """Fork the processes of a training; returns their ids and the end of a pipe that says what the first one does."""
    reading, writing = os.pipe()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(reading)
                log = os.open(folder / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1), os.dup2(log, 2)
                if processes > 1:
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
                    os.environ |= {"WORLD_SIZE": str(processes), "NODE_RANK": "0"}

                def say(phase, rank=rank):
                    if rank == 0:
                        os.write(writing, f"{phase}\n".encode())

                train(granularity, folder, say, rank, processes)
                code = 0
            except BaseException:  # the parent reads the log
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    os.close(writing)
    return children, reading


def follow(children, reading, phase, occurrence, delay):
    """Kill the processes some time after a phase has begun so many times; False if they ended before."""
    text = b""
    while True:
        select.select([reading], [], [])
        part = os.read(reading, 4096)
        text += part
        seen = text.decode().split("\n").count(phase) if phase else 0
        if not part or (phase and seen >= occurrence):
            break
    killed = bool(part)
    if killed:
        time.sleep(delay)
        for child in children:
            os.kill(child, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.close(reading)
    if not killed and any(codes):
        raise RuntimeError(f"training failed with {codes}")
    return killed and any(code == -signal.SIGKILL for code in codes)


def compare(granularity, kills, processes, seed=0, report=print):
    """Number of kills; raises AssertionError unless all trainings end the same."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        assert not follow(*start(granularity, whole, processes), None, 0, 0)
        expected = [torch.load(whole / f"final-{rank}.pt", weights_only=True) for rank in range(processes)]
        done = attempt = 0
        while done < kills:
            attempt += 1
            folder = Path(temporary) / f"killed-{attempt}"
            folder.mkdir()
            moments = []
            while not (folder / "final-0.pt").exists():
                remaining = [phase for phase in PHASES if phase not in [moment[0] for moment in moments]]
                phase = rng.choice(remaining) if remaining and done < kills else None
                moment = (phase, rng.randint(1, 4 if phase != "slimming" else 1), rng.uniform(0, LONGEST))
                if phase == "slimming":
                    moment = (*moment[:2], 4 * moment[2])
                moments.append(moment)
                done += follow(*start(granularity, folder, processes), *moment)
            for rank, final in enumerate(expected):
                resumed = torch.load(folder / f"final-{rank}.pt", weights_only=True)
                wrong = [part for part, value in final.items() if not equal(value, resumed[part])]
                assert not wrong, (granularity, rank, moments, wrong)
            said = ", ".join(f"{phase} {n} + {1000 * delay:.0f} ms" for phase, n, delay in moments if phase)
            report(f"{granularity}, {processes} process(es), training {attempt}: killed at {said}: equal", flush=True)
            shutil.rmtree(folder)
    return done


def main(granularities=("channel", "weight"), kills=30, processes=1):
    for granularity in granularities:
        done = compare(granularity, kills, processes)
        print(f"{granularity}: {done} kills, weights, optimizer, masks and plan bit-equal every time")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    chosen = [argument for argument in arguments if not argument.isdigit()] or ["channel", "weight"]
    numbers = [int(argument) for argument in arguments if argument.isdigit()]
    main(chosen, *numbers)
