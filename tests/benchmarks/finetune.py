"""Accuracy, size and latency of channels pruned in different ways, after equal training; Torch-Pruning among them.

    PYTHONPATH=. python tests/benchmarks/finetune.py RESULTS.jsonl EXPERIMENT SEED METHOD[,METHOD...] [OVERRIDES...]
    PYTHONPATH=. python tests/benchmarks/finetune.py RESULTS.jsonl  # the table

Resumable: what has a line in RESULTS.jsonl is not repeated. Needs torch-pruning==1.6.1. All methods train for as many
epochs under the same learning rates, and prune at half of them, "annealed" ones a little after every epoch until then.
The others' trainings are the same until one epoch before that, but for the L1 penalty on the scales that network
slimming and Torch-Pruning's BN-scale pruner want, so those epochs are trained once for each seed. Torch-Pruning takes
the amount as pruning_ratio, of its groups of coupled channels; it cannot let a batch norm select from a stream.
The speed-up is the latency of the dense network over that of the smaller one, measured in turns after the training.
"""

import copy
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from lightning.pytorch import Callback
from torch import nn

from lightning_fscreen.cli.run import run
from lightning_fscreen.cli.tables import summary
from lightning_fscreen.costs.latency import measure_latency
from lightning_fscreen.costs.size import measure_size

AMOUNTS = (0.5, 0.7)
FSCREEN = "callbacks.fscreen"
BY_LAYER, GLOBAL = ([f"{FSCREEN}.schedule=one_shot", f"{FSCREEN}.scope={scope}"] for scope in ("layer", "global"))
ANNEALED = [f"{FSCREEN}.schedule=cubic", f"{FSCREEN}.scope=global"]
L1 = ["+callbacks.l1._target_=lightning_fscreen.l1.ScaleL1", "+callbacks.l1.strength=1e-4"]
PEER = [f"~{FSCREEN}", f"+callbacks.peer._target_={__name__}.TorchPruning"]
# What is trained until then, and what follows. "Magnitude" is what the default criterion does, "masks only" the same
# without slimming, "Torch-Pruning" its BNScalePruner. "Global" methods rank all layers together; the others take
# the same share of every layer, as Torch-Pruning does by default.
METHODS = {
    "dense": ("plain", [f"~{FSCREEN}"]),
    "masks only": ("plain", ["method=magnitude", *BY_LAYER, f"{FSCREEN}.slim=false"]),
    "magnitude": ("plain", ["method=magnitude", *BY_LAYER]),
    "random": ("plain", ["method=random", *BY_LAYER]),
    "network slimming": ("L1", ["method=network_slimming", *BY_LAYER]),
    "Torch-Pruning": ("L1", PEER),
    "global magnitude": ("plain", ["method=magnitude", *GLOBAL]),
    "annealed global magnitude": (None, ["method=magnitude", *ANNEALED]),
    "global sum (paper)": ("plain", ["method=screening_sum", *GLOBAL]),
    "global random": ("plain", ["method=random", *GLOBAL]),
    "global network slimming": ("L1", ["method=network_slimming", *GLOBAL]),
    "global Torch-Pruning": ("L1", [*PEER, "+callbacks.peer.all_together=true"]),
}
BEFORE = {"plain": [f"~{FSCREEN}"], "L1": [f"~{FSCREEN}", *L1]}


class Stop(Callback):
    """Ends a training early, its learning rates as they would be in the whole one."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.epochs:
            trainer.should_stop = True


class Keep(Callback):
    """Keeps the dense network, and the one that was tested."""

    def setup(self, trainer, pl_module, stage):
        if stage == "fit":
            Keep.dense = copy.deepcopy(pl_module.net)

    def on_test_end(self, trainer, pl_module):
        Keep.network, Keep.shape = pl_module.net, trainer.datamodule.image_shape


class TorchPruning(Callback):
    """Network slimming as in Torch-Pruning's documentation: L1 on the scales until then, BNScalePruner, fine-tuning."""

    def __init__(self, amount, epoch, all_together=False):
        self.amount, self.epoch, self.all_together = amount, epoch, all_together

    def on_train_start(self, trainer, pl_module):
        import torch_pruning as tp  # only this method needs it, and the README's tables do not

        network = pl_module.net
        last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
        images = torch.zeros(2, *trainer.datamodule.image_shape)
        self.pruner = tp.pruner.BNScalePruner(
            network.eval(),
            images,
            importance=tp.importance.BNScaleImportance(),
            global_pruning=self.all_together,
            pruning_ratio=self.amount,
            ignored_layers=[last],
            reg=1e-4,
        )
        network.train()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.current_epoch < self.epoch:
            self.pruner.regularize(pl_module.net)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.pruner.step()
            optimizer = trainer.optimizers[0]
            optimizer.param_groups[0]["params"] = list(pl_module.net.parameters())
            optimizer.state.clear()


def train(folder, experiment, overrides):
    """Test error, and seconds."""
    quiet = [f"extras.{part}=false" for part in ("print_config", "print_report", "figures", "latency")]
    fixed = [f"experiment={experiment}", f"paths.output_dir={folder}", "optimized_metric=test/error"]
    start = time.perf_counter()
    with initialize_config_module("lightning_fscreen.conf", version_base="1.3"):
        keep = f"+callbacks.keep._target_={__name__}.Keep"
        error = run(compose("train", [*fixed, *quiet, keep, *overrides]))
    return error, time.perf_counter() - start


def half_of(experiment, overrides):
    with initialize_config_module("lightning_fscreen.conf", version_base="1.3"):
        return compose("train", [f"experiment={experiment}", *overrides]).trainer.max_epochs // 2


def measure(experiment, seed, method, amount, checkpoint, overrides):
    half = half_of(experiment, overrides)
    target = f"{FSCREEN}.end_epoch={half}", f"{FSCREEN}.amount={amount}"
    peer = f"+callbacks.peer.epoch={half}", f"+callbacks.peer.amount={amount}"
    own = METHODS[method][1]
    own = [*own, *([] if amount is None else peer if PEER[1] in own else target)]
    own += [] if checkpoint is None else [f"ckpt_path={checkpoint}"]
    with tempfile.TemporaryDirectory() as folder:
        error, seconds = train(folder, experiment, [*own, f"seed={seed}", *overrides])
    inputs = (torch.zeros(2, *Keep.shape),), {}
    size = measure_size(Keep.network, inputs, 2)
    return {
        "experiment": experiment,
        "overrides": [override for override in overrides if not override.startswith("data.root=")],
        "method": method,
        "amount": amount,
        "seed": seed,
        "test_error": error,
        "params": size.params,
        "macs": size.macs,
        "speedup": {} if amount is None else speedup(),
        "seconds": round(seconds, 1),
    }


def speedup():
    """By batch size."""
    args = (torch.zeros(1, *Keep.shape),)
    pairs = [(measure_latency(Keep.dense, args), measure_latency(Keep.network, args)) for _ in range(3)]
    return {str(size): round(statistics.median(a[size] / b[size] for a, b in pairs), 3) for size in pairs[0][0]}


def table(results):
    """Markdown, mean ± standard deviation over the seeds."""
    groups = {}
    for line in map(json.loads, Path(results).read_text().splitlines()):
        groups.setdefault((line["method"], line["amount"]), []).append(line)
    rows = ["| | channels pruned | test error | parameters | MACs | batch of 1 / 64 faster | seeds |", "|---" * 7 + "|"]
    for amount in (None, *AMOUNTS):
        for method in METHODS:
            if lines := groups.get((method, amount)):
                errors = [100 * line["test_error"] for line in lines]
                params, macs = (statistics.fmean(line[key] for line in lines) for key in ("params", "macs"))
                faster = [statistics.fmean(line["speedup"].get(size, 1.0) for line in lines) for size in ("1", "64")]
                cells = (
                    method,
                    f"{100 * (amount or 0):g} %",
                    f"{summary(errors)} %",
                    f"{params:,.0f}",
                    f"{macs / 1e6:.2f} M",
                    f"{faster[0]:.2f} / {faster[1]:.2f} ×",
                    str(len(lines)),
                )
                rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main(results, experiment, seed, methods, *overrides):
    path = Path(results)
    shared = path.absolute().with_suffix(".work") / seed  # trainings until one epoch before half
    half = half_of(experiment, overrides)
    for method in methods.split(","):
        before, _ = METHODS[method]
        checkpoint = shared / before / "checkpoints" / "last.ckpt" if before else None
        for amount in [None] if method == "dense" else AMOUNTS:
            lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
            if (method, amount, int(seed)) in {(line["method"], line["amount"], line["seed"]) for line in lines}:
                continue
            if checkpoint is not None and not checkpoint.exists():
                stop = [f"+callbacks.stop._target_={__name__}.Stop", f"+callbacks.stop.epochs={half - 1}"]
                unfinished = shared / f"{before}.unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)
                train(unfinished, experiment, [*BEFORE[before], *stop, f"seed={seed}", *overrides])
                unfinished.rename(shared / before)
            line = measure(experiment, int(seed), method, amount, checkpoint, list(overrides))
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    print(table(*sys.argv[1:]), end="") if len(sys.argv) == 2 else main(*sys.argv[1:])
