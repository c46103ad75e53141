"""Exactness of slimming on every torchvision classification network with batch norms.

    python tests/benchmarks/torchvision_models.py RESULTS.jsonl [NETWORK ...]   # resumable: what is there is skipped
    python tests/benchmarks/torchvision_models.py RESULTS.jsonl --table         # as Markdown

For 30, 50 and 70 % of the channels and both kinds of bias: random masks (coupled channels together, no layer empty),
random scales, shifts and running statistics; the slim network against the masked one, as the largest relative error
of the outputs in eval mode at two resolutions, of outputs and gradients in train mode (without dropout and stochastic
depth) and of the running statistics after three more steps. Four 64 × 64 images (inception_v3 299, maxvit_t 224).
"rounding" is the error of the masked network itself in float32 against float64: batch norms amplify rounding in train
mode, and max pooling and ReLU make gradients jump, so float32 cannot agree with anything more closely than that.
"""

import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from torchvision.ops import StochasticDepth

from lightning_fscreen import find_gates, slim
from lightning_fscreen.ranking.budgeted import rank_and_prune

AMOUNTS = (0.3, 0.5, 0.7)
BIASES = ("zero", "fold")
SIZES = {"inception_v3": (299, 331), "maxvit_t": (224, 224)}
OPTIONS = {name: {"init_weights": False} for name in ("googlenet", "inception_v3")}  # which takes seconds
LARGEST = 300_000_000  # parameters; float64 copies of more do not fit into 24 GB
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def build_on_meta(name):
    """Without weights, where its constructor allows that."""
    try:
        with torch.device("meta"):
            return models.get_model(name, **OPTIONS.get(name, {}))
    except (NotImplementedError, RuntimeError):  # it looks at values
        return models.get_model(name, **OPTIONS.get(name, {}))


def build(name):
    torch.manual_seed(0)
    network = models.get_model(name, **OPTIONS.get(name, {}))
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.5)
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, nn.Dropout | StochasticDepth):
            module.p = 0.0
    return network


def masked_copy(network, keep, bias):
    network = copy.deepcopy(network)
    with torch.no_grad():
        for name, kept in keep.items():
            module = network.get_submodule(name)
            module.weight[~kept] = 0
            if bias == "zero":
                module.bias[~kept] = 0
    return network


def error(first, second):
    """Relative to the largest value; pairs of tensors."""
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)))
    return worst


def evaluate(network, x):
    network.eval()
    with torch.no_grad():
        return pytree.tree_leaves(network(x))


def train(network, x):
    """Outputs in train mode; gradients of a random linear function of them remain."""
    network.train()
    network.zero_grad()
    outputs = [leaf for leaf in pytree.tree_leaves(network(x)) if isinstance(leaf, torch.Tensor)]
    generator = torch.Generator().manual_seed(1)
    sum((out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum() for out in outputs).backward()
    return [out.detach() for out in outputs]


def running(network, plan):
    """Running statistics, of channels that are not multiplied by zero."""
    found = []
    for name, buffer in network.named_buffers():
        if "running" in name:
            on = network.get_submodule(name.rpartition(".")[0]).weight != 0
            found.append(plan.cut(name, torch.where(on, buffer, 0.0)))
    return found


def compare(network, keep, bias, x, other):
    """Errors, the plan, the seconds that planning and slimming took, the slim network, and what the masked one gave."""
    masked, slimmed = masked_copy(network, keep, bias), copy.deepcopy(network)
    start = time.perf_counter()
    plan = slim(slimmed, keep, x, bias)
    seconds = time.perf_counter() - start
    errors = {"eval": error(evaluate(masked, x), evaluate(slimmed, x))}
    errors["resolution"] = error(evaluate(masked, other), evaluate(slimmed, other))
    outputs = train(masked, x)
    errors["train"] = error(outputs, train(slimmed, x))
    own = dict(slimmed.named_parameters())
    for name, kept in keep.items():  # those of a pruned channel that stays to carry constants are no survivors
        for parameter in (f"{name}.weight", f"{name}.bias"):
            masked.get_parameter(parameter).grad[~kept] = 0
            own[parameter].grad[~plan.cut(parameter, kept)] = 0
    pairs = [
        (plan.cut(name, parameter.grad), own[name].grad)
        for name, parameter in masked.named_parameters()
        if parameter.grad is not None and own[name].grad is not None
    ]
    scale = max(float(a.abs().max()) for a, _ in pairs)
    errors["gradients"] = max(float((a - b).abs().max()) for a, b in pairs) / scale
    reference = outputs, [gradient for gradient, _ in pairs]
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for _ in range(3):
            batch = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            masked(batch), slimmed(batch)
    nothing = type(plan)()
    errors["statistics"] = error(running(masked, plan), running(slimmed, nothing))
    reference = *reference, running(masked, nothing)
    return errors, plan, seconds, slimmed, reference


def size(network, x):
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x[:1])
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2


def measure(name):
    network = build(name)
    small, large = SIZES.get(name, (64, 96))
    x, other = torch.randn(4, 3, small, small), torch.randn(2, 3, large, large)
    start = time.perf_counter()
    gates = find_gates(network, x, kinds=["channel"])
    seconds = time.perf_counter() - start
    candidates = [gate for gate in gates if gate.excluded is None]
    before = size(network, x)
    for amount in AMOUNTS:
        generator = torch.Generator().manual_seed(round(100 * amount))
        scores = {gate.name: torch.rand(gate.channels, generator=generator) for gate in candidates}
        kept = {gate.name: torch.ones(gate.channels, dtype=torch.bool) for gate in candidates}
        units = {gate.name: torch.tensor(gate.units) for gate in candidates}
        keep = rank_and_prune(scores, kept, amount, units=units)
        for bias in BIASES:
            row = {"network": name, "amount": amount, "bias": bias, "gates": len(gates), "excluded": {}}
            row["excluded"] = {gate.name: gate.excluded for gate in gates if gate.excluded}
            row["channels"] = sum(gate.channels for gate in gates)
            row["kept"] = sum(int(mask.sum()) for mask in keep.values())
            row["before"], row["find_seconds"] = before, seconds
            references = []
            for dtype in (torch.float32, torch.float64)[: 1 if before[0] > LARGEST else 2]:
                errors, plan, took, slimmed, reference = compare(
                    network.to(dtype), keep, bias, x.to(dtype), other.to(dtype)
                )
                references.append(reference)
                row[str(dtype).removeprefix("torch.")] = errors
                if dtype == torch.float32:
                    row["after"], row["seconds"], row["pinned"] = size(slimmed, x), took, len(plan.pinned)
                del slimmed
            if len(references) == 2:
                row["rounding"] = rounding(*references)
            references.clear()
            network.to(torch.float32)
            yield row


def rounding(own, exact):
    """How far the masked network is from itself in float64."""
    (outputs, gradients, statistics_), (exact_outputs, exact_gradients, exact_statistics) = own, exact
    scale = max(float(gradient.abs().max()) for gradient in exact_gradients)
    wrong = (float((a - b).abs().max()) for a, b in zip(gradients, exact_gradients, strict=True))
    return {
        "train": error(exact_outputs, outputs),
        "gradients": max(wrong) / scale,
        "statistics": error(exact_statistics, statistics_),
    }


def misses(row):
    """Errors beyond the tolerance, and beyond what rounding does to the masked network itself."""
    for kind, limit in TOLERANCE.items():
        for key, e in row.get(kind, {}).items():
            if not e <= max(limit, row.get("rounding", {}).get(key, 0.0) if kind == "float32" else 0.0):
                yield kind, key, e


def table(rows):
    """One line for each network; sizes are those of 50 %, bias="zero", errors the worst of all six cases."""
    print("| network | gates | channels | params (M) | MACs (M) | float64 | float32 eval | float32 train | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == name]
        half = next((row for row in own if row["amount"] == 0.5 and row["bias"] == "zero"), None)
        if half is None:
            continue
        sizes = [f"{b / 1e6:.2f} → {a / 1e6:.2f}" for b, a in zip(half["before"], half["after"], strict=True)]
        double = [max(row["float64"].values()) for row in own if "float64" in row]
        evaluated = max(max(row["float32"][key] for key in ("eval", "resolution")) for row in own)
        trained = max(row["float32"]["train"] for row in own)
        took = statistics.median(row["seconds"] for row in own)
        excluded = f" ({len(half['excluded'])} excluded)" if half["excluded"] else ""
        print(
            f"| {name} | {half['gates']}{excluded} | {half['channels']} | {' | '.join(sizes)} "
            f"| {f'{max(double):.0e}' if double else 'too large'} | {evaluated:.0e} | {trained:.0e} | {took:.1f} |"
        )


def main(path, names):
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if names == ["--table"]:
        table(done)
        return
    if not names:
        sizes = {}
        for name in models.list_models(module=models):
            network = build_on_meta(name)
            if any(isinstance(module, _BatchNorm) for module in network.modules()):
                sizes[name] = sum(p.numel() for p in network.parameters())
        names = sorted(sizes, key=sizes.__getitem__)
    for name in names:
        if sum(row["network"] == name for row in done) == len(AMOUNTS) * len(BIASES):
            continue
        for row in measure(name):
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            bad = [f"{kind} {key} {e:.1e}" for kind, key, e in misses(row)]
            print(
                name,
                row["amount"],
                row["bias"],
                row["before"],
                row["after"],
                f"{row['seconds']:.1f} s",
                *bad,
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
