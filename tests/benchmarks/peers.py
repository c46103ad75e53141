"""Slimming next to Torch-Pruning (pip install torch-pruning==1.6.1), on the same networks and masks, on one thread.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/peers.py [NETWORK ...]

Half of the channels go, at random, coupled ones together. "same masks": Torch-Pruning removes the same channels of the
same batch norms, where it can without taking channels that stay (it cannot let a batch norm of a pre-activation network
or a DenseNet select from its stream). "other channels": its own BN-scale pruner takes half of what it can prune,
globally, which is another network. Sizes after (an error's name where there are none), and seconds for everything from
the network and one 64 × 64 batch to the smaller network; ours include the capture and the verification in float64.
"""

import copy
import sys
import time
from importlib.metadata import version

import torch
import torch_pruning as tp
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_fscreen import find_gates, slim
from lightning_fscreen import models as own_models
from lightning_fscreen.ranking.budgeted import rank_and_prune
from tests.benchmarks.torchvision_models import build, size

SAME = (
    "resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "vgg16_bn", "mobilenet_v2", "mobilenet_v3_small",
    "mnasnet1_0", "efficientnet_b0", "regnet_y_400mf", "googlenet",
)  # fmt: skip
OWN = ("densenet121", "densenet201", "resnet164", "densenet40")
AMOUNT = 0.5


def masks(network, x):
    gates = [gate for gate in find_gates(network, x, kinds=["channel"]) if gate.excluded is None]
    generator = torch.Generator().manual_seed(0)
    scores = {gate.name: torch.rand(gate.channels, generator=generator) for gate in gates}
    kept = {gate.name: torch.ones(gate.channels, dtype=torch.bool) for gate in gates}
    units = {gate.name: torch.tensor(gate.units) for gate in gates}
    return gates, rank_and_prune(scores, kept, AMOUNT, scope="layer", units=units)


def prune_the_same(network, gates, keep, x):
    graph = tp.DependencyGraph().build_dependency(network.eval(), x)
    names = {module: name for name, module in network.named_modules()}
    done = set()
    for gate in gates:
        pruned = (~keep[gate.name]).nonzero().flatten().tolist()
        if gate.group in done or not pruned:
            continue
        module = network.get_submodule(gate.name)
        group = graph.get_pruning_group(module, tp.prune_batchnorm_out_channels, idxs=pruned)
        coupled = {names[d.target.module]: set(i) for d, i in group if isinstance(d.target.module, _BatchNorm)}
        if all(name in keep and not keep[name][list(channels)].any() for name, channels in coupled.items()):
            done.add(gate.group)
            group.prune()


def prune_half(network, x):
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    pruner = tp.pruner.BNScalePruner(
        network.eval(),
        x,
        importance=tp.importance.BNScaleImportance(),
        global_pruning=True,
        pruning_ratio=AMOUNT,
        ignored_layers=[last],
    )
    pruner.step()


NONE = ("–", "–", "–")


def measured(prune, network, x):
    """Parameters, MACs and seconds, as text."""
    network = copy.deepcopy(network)
    start = time.perf_counter()
    prune(network)
    seconds = time.perf_counter() - start
    params, macs = size(network, x)
    return f"{params / 1e6:.2f} M", f"{macs / 1e6:.1f} M", f"{seconds:.2g}"


def attempted(prune, network, x):
    """The same of a peer: whatever it raises is its result."""
    try:
        return measured(prune, network, x)
    except Exception as error:
        return type(error).__name__, *NONE[1:]


def rows(name):
    small = 32 if name in ("resnet164", "densenet40") else 64
    network = getattr(own_models, name)() if small == 32 else build(name)
    x = torch.randn(2, 3, small, small)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight)
    gates, keep = masks(network, x)
    params, macs = size(network, x)
    before = f"{params / 1e6:.2f} M", f"{macs / 1e6:.1f} M"
    ours = measured(lambda network: slim(network, keep, x), network, x)
    yield name, before, ours, attempted(lambda network: prune_the_same(network, gates, keep, x), network, x)
    if name in OWN:
        yield f"{name}, other channels", before, NONE, attempted(lambda network: prune_half(network, x), network, x)


def main(names):
    peer = f"Torch-Pruning {version('torch-pruning')}"
    print(f"| | parameters | this | {peer} | MACs | this | {peer} | seconds: this | {peer} |\n{'|---' * 9}|")
    for name in names:
        for label, (params, macs), ours, theirs in rows(name):
            cells = label, params, ours[0], theirs[0], macs, ours[1], theirs[1], ours[2], theirs[2]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or [*SAME, *OWN])
