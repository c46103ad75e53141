"""Exactness of removing units (hidden neurons, channels with and without batch norms) from whole networks.

    python tests/benchmarks/units.py RESULTS.jsonl torchvision [NETWORK ...]   # resumable: what is there is skipped
    python tests/benchmarks/units.py RESULTS.jsonl timm NETWORK ...
    python tests/benchmarks/units.py RESULTS.jsonl --table                     # as Markdown

A random half of the units of every network, those that share their fate together, no layer empty, with `bias="zero"`
and `bias="fold"` (what "mean" is to `slim`: the biases are what they are). Random scales, shifts and running
statistics. The slim network against the one with zeros in its rows: the largest difference of the outputs relative to
the largest output, in float64, in eval and in train mode (without dropout and stochastic depth). Two 64 × 64 images,
where the network takes no other size. Without names: every classification network of torchvision under 170 M
parameters.
"""

import copy
import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils import _pytree as pytree

from lightning_fscreen import find_gates, slim
from lightning_fscreen.slimming import CaptureError, VerificationError

LARGEST = 170_000_000
SIZES = {"inception_v3": 128, "googlenet": 96, "maxvit_t": 224}


def build(library: str, name: str) -> tuple[nn.Module, int]:
    """A network in float64 without dropout, and the size of its images."""
    torch.manual_seed(0)
    if library == "torchvision":
        from torchvision import models

        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        net = getattr(models, name)(**options)
        size = SIZES.get(name, 224 if "vit_" in name else 64)
    else:
        import timm

        net = timm.create_model(name, num_classes=100)
        size = net.default_cfg["input_size"][-1]
    for module in net.modules():
        if "Drop" in type(module).__name__ or type(module).__name__ == "StochasticDepth":
            for attribute in ("p", "drop_prob"):
                if hasattr(module, attribute):
                    setattr(module, attribute, 0.0)
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        if isinstance(module, _BatchNorm | nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if module.bias is not None:
                nn.init.normal_(module.bias)
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    for parameter in net.parameters():
        if parameter.abs().max() < 1e-3:  # heads and scales that begin at, or next to, zero would hide all errors
            nn.init.normal_(parameter, std=0.1)
    return net.double().eval(), size


def masks_of(gates, seed=0):
    """A random half of all units; every gate keeps at least one."""
    generator = torch.Generator().manual_seed(seed)
    units = sorted({unit for gate in gates for unit in gate.units if unit >= 0})
    draws = torch.rand(len(units), generator=generator)
    pruned = {unit for unit, draw in zip(units, draws.tolist(), strict=True) if draw < 0.5}
    keep = {}
    for gate in gates:
        mask = torch.tensor([unit not in pruned for unit in gate.units])
        if gate.excluded is None and not mask.all():
            if not mask.any():
                pruned -= set(gate.units)
            keep[gate.name] = mask
    return {gate.name: torch.tensor([unit not in pruned for unit in gate.units]) for gate in gates if gate.name in keep}


@torch.no_grad()
def switch_off(net, keep, bias):
    """Zeros in the rows of the pruned units, or in the scales of the pruned channels."""
    for name, mask in keep.items():
        module = net.get_submodule(name)
        weight = module.weight
        if isinstance(module, _ConvTransposeNd):
            weight = weight.unflatten(0, (module.groups, -1)).transpose(1, 2)
            mask = mask.unflatten(0, (module.groups, -1))
        weight[~mask] = 0
        if bias == "zero" and module.bias is not None:
            module.bias[~mask.flatten()] = 0


def outputs(net, images, training):
    """All tensors that it returns, as one."""
    torch.manual_seed(1)
    with torch.no_grad():
        found = pytree.tree_leaves(net.train(training)(images))
    net.eval()
    return torch.cat([item.flatten() for item in found if isinstance(item, torch.Tensor)])


def trial(library, name):
    """One network."""
    net, size = build(library, name)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    row = {"library": library, "network": name, "params": sum(p.numel() for p in net.parameters())}
    try:
        start = time.perf_counter()
        gates = find_gates(net, images)
        row["find"] = time.perf_counter() - start
        keep = masks_of(gates)
        for kind in ("neuron", "channel"):
            own = [gate for gate in gates if gate.kind == kind]
            row[kind] = [sum(gate.excluded is None for gate in own), len(own)]
        row["reasons"] = dict(Counter(gate.excluded for gate in gates if gate.excluded).most_common(5))
        for bias in ("zero", "fold"):
            masked, own = copy.deepcopy(net), copy.deepcopy(net) if bias == "zero" else net
            switch_off(masked, keep, bias)
            start = time.perf_counter()
            plan = slim(own, keep, images, bias=bias)
            row[f"slim_{bias}"] = time.perf_counter() - start
            row[f"left_{bias}"] = sum(p.numel() for p in own.parameters()) / row["params"]
            row[f"kept_{bias}"] = len(plan.kept_for)
            for training in (False, True):
                a, b = outputs(masked, images, training), outputs(own, images, training)
                row[f"error_{bias}_{'train' if training else 'eval'}"] = float((a - b).abs().max() / a.abs().max())
    except (CaptureError, VerificationError, ValueError) as error:
        row["refused"] = f"{type(error).__name__}: {error}"[:300]
    return row


def table(rows):
    """As Markdown."""
    print("| network | parameters | neurons' layers | batch norms | left | error | what keeps its units |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        name = f"`{row['network']}`"
        if "refused" in row:
            print(f"| {name} | {row['params']:,} | | | | refused | {row['refused']} |")
            continue
        error = max(value for key, value in row.items() if key.startswith("error"))
        why = "; ".join(
            f"{count}: {reason}" for reason, count in row["reasons"].items() if "output of the" not in reason
        )
        counts = [f"{row[kind][0]} of {row[kind][1]}" if row[kind][1] else "" for kind in ("neuron", "channel")]
        print(f"| {name} | {row['params']:,} | {' | '.join(counts)} | {row['left_zero']:.3f} | {error:.0e} | {why} |")


def main():
    """Run, or print."""
    path, library, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if library == "--table":
        table(rows)
        return
    if not names:
        from torchvision import models

        weights = {
            name: models.get_model_weights(name).DEFAULT.meta["num_params"] for name in models.list_models(models)
        }
        names = sorted((name for name, count in weights.items() if count < LARGEST), key=weights.__getitem__)
    done = {(row["library"], row["network"]) for row in rows}
    for name in names:
        if (library, name) not in done:
            row = trial(library, name)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(name, row, flush=True)


if __name__ == "__main__":
    main()
