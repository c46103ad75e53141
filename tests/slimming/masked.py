"""Random networks with random channels switched off, and the masked network that slimming is compared with."""

from __future__ import annotations

import copy
import os
import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

import lightning_fscreen
from lightning_fscreen.slimming import SlimmingPlan, slim
from lightning_fscreen.slimming.gates import STAYS
from tests.slimming import difference, outputs
from tests.slimming.networks import (
    ACTIVATIONS,
    ANY_SIZE,
    AVG_POOL,
    BLOCKS,
    CONV,
    HEADS,
    MAX_POOL,
    NORM,
    NORM_BLOCKS,
    TRANSPOSED,
    Auxiliary,
    conv,
    glu,
    grouped,
    linear_norm,
    shuffle,
    shuffle_unit,
)

find_gates = partial(lightning_fscreen.find_gates, kinds=["channel"])
"""Batch norms alone."""

CASES = int(os.environ.get("FSCREEN_CASES", "25"))
BIASES = ["zero", "fold"]


@dataclass(repr=False)
class Case:
    """A random network in float64 with random batch norms, masks, an input, and whether it takes other resolutions.

    `dead` ones have layers that nobody reads: of those only the shape is kept.
    """

    network: Any
    keep: dict[str, Tensor]
    example: Tensor
    any_size: bool
    bias: str
    dead: bool = False

    def __repr__(self) -> str:
        masks = {name: mask.int().tolist() for name, mask in self.keep.items()}
        return f"{self.network} on {tuple(self.example.shape)}, {self.bias}, {masks}"


def randomize(network: nn.Module) -> None:
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, _BatchNorm) and module.affine:
                module.weight.normal_()
                module.bias.normal_()
            if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 2.0)


def called_norms(network: nn.Module, example: Tensor) -> dict[str, _BatchNorm]:
    """Batch norms that the network calls in one of its modes."""
    norms = {name: module for name, module in network.named_modules() if isinstance(module, _BatchNorm)}
    copied, called = copy.deepcopy(network), set()
    for name in norms:
        copied.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    for training in (True, False):
        with torch.no_grad():
            copied.train(training)(example.clone())
    return {name: norm for name, norm in norms.items() if name in called}


def masks(network: nn.Module, example: Tensor, rng: random.Random, share: float, together: bool) -> dict[str, Tensor]:
    """Random masks of all gates, of at least one channel; arbitrary ones, or such that prune whole units."""
    if together:
        units = {gate.name: gate.units for gate in find_gates(network, example) if not gate.excluded}
    else:  # nothing needs to be known about the graph
        units = {name: (STAYS,) * norm.num_features for name, norm in called_norms(network, example).items()}
    decided: dict[int, bool] = {}
    keep = {}
    for name, channels in units.items():
        if network.get_submodule(name).weight is None:
            continue
        kept = [
            decided.setdefault(unit, rng.random() >= share) if unit != STAYS else rng.random() >= share
            for unit in channels
        ]
        if not any(kept):
            kept[rng.randrange(len(kept))] = True
        keep[name] = torch.tensor(kept)
    return keep


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rank = draw(st.sampled_from([2, 2, 1, 3]))
    blocks = draw(st.lists(st.sampled_from([*NORM_BLOCKS, *NORM_BLOCKS, *BLOCKS]), min_size=1, max_size=5))
    head = draw(st.sampled_from([*HEADS, linear_norm]))
    bias = draw(st.sampled_from(BIASES))
    together = draw(st.booleans())
    seed = draw(st.integers(0, 2**31))
    rng = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = torch.randn(3, 4, *[6 if rank == 3 else 8] * rank)
        layers: list[nn.Module] = [conv(4, rank, rng)]
        value = layers[0](x)
        for make in blocks:
            if make in (grouped, glu, shuffle, shuffle_unit) and value.shape[1] % 2:
                continue
            layers.append(make(value.shape[1], rank, rng))
            value = layers[-1].eval()(value)
        if rng.random() < 0.3:
            layers[-1] = nn.Sequential(layers[-1])
        layers.append(head(value.shape[1:], rank, rng))
        network: nn.Module = nn.Sequential(*layers)
        if rng.random() < 0.2:
            network = Auxiliary(network, 4, rank)
        network = network.double()
        randomize(network)
        for parameter in network.parameters():
            parameter.requires_grad_(rng.random() < 0.95)
        for module in network.modules():
            module.training = rng.random() < 0.5
        keep = masks(network, x.double(), rng, rng.choice([0.3, 0.5, 0.9]), together)
    return Case(network, keep, x.double(), head in ANY_SIZE, bias)


class Dag(nn.Module):
    """Any operators on any earlier feature maps, all of one resolution.

    Args:
        steps: (kind, and three numbers that choose operands and sizes), one for each operator.
        rank: number of positional dimensions.
        rng: chooses everything else.
        unread: share of the last maps that nobody reads.
    """

    def __init__(
        self, steps: list[tuple[str, int, int, int]], rank: int, rng: random.Random, unread: float = 0.0
    ) -> None:
        super().__init__()
        self.rank = rank
        self.parts = nn.ModuleList([CONV[rank](4, 4, 3, padding=1), CONV[rank](2, 6, 1), NORM[rank](6)])
        self.program: list[tuple[str, int | None, tuple[int, ...]]] = [
            ("call", 0, (0,)),
            ("call", 1, (1,)),
            ("call", 2, (3,)),
        ]
        self.channels = [4, 2, 4, 6, 6]  # of the inputs, and of what every step puts out
        for kind, *numbers in steps:
            self._add(kind, numbers, rng)
        read = {source for _, _, sources in self.program for source in sources}
        leaves = [index for index in range(2, len(self.channels)) if index not in read]
        self.leaves = [leaf for leaf in leaves if leaf == leaves[-1] or rng.random() >= unread]
        self.aside = leaves[-1] if rng.random() < 0.2 else None  # read in train mode only
        self.norm = nn.BatchNorm1d(self.channels[leaves[-1]])
        self.aux = nn.Linear(self.channels[leaves[-1]], 3)
        self.fc = nn.Linear(sum(self.channels[leaf] for leaf in self.leaves), 3)

    def _add(self, kind: str, numbers: list[int], rng: random.Random) -> None:
        first, second, size = numbers
        source = len(self.channels) - 1 - first % min(len(self.channels), 4)
        width = self.channels[source]
        others = [index for index, channels in enumerate(self.channels) if channels == width]
        other = others[second % len(others)]
        if kind in ("add", "mul", "gate"):
            self._append(kind, None, (source, other), width)
        elif kind == "cat":
            third = size % len(self.channels)
            if width + self.channels[third] <= 16:
                self._append(kind, None, (source, third), width + self.channels[third])
        elif kind in ("halves", "slices") and width % 2 == 0:
            self._append(kind + "0", None, (source,), width // 2)
            self._append(kind + "1", None, (source,), width // 2)
        elif kind == "shuffle" and width % 2 == 0:
            self._append(kind, None, (source,), width)
        elif kind == "again":  # one module, another map
            called = [
                (again, self.channels[index + 2])
                for index, (_, again, sources) in enumerate(self.program)
                if again is not None and self.channels[sources[0]] == width
            ]
            if called:
                again, out = called[second % len(called)]
                self._append("call", again, (source,), out)
        elif kind not in ("halves", "slices", "shuffle"):
            part, out = self._part(kind, width, [2, 3, 4, 6, 8][size % 5], rng)
            self.parts.append(part)
            self._append("call", len(self.parts) - 1, (source,), out)

    def _append(self, kind: str, part: int | None, sources: tuple[int, ...], channels: int) -> None:
        self.program.append((kind, part, sources))
        self.channels.append(channels)

    def _part(self, kind: str, width: int, size: int, rng: random.Random) -> tuple[nn.Module, int]:
        rank, bias = self.rank, rng.random() < 0.5
        if kind == "norm":
            return NORM[rank](width), width
        if kind == "activation":
            make: Any = rng.choice([*ACTIVATIONS, partial(nn.PReLU, width), nn.Hardsigmoid, nn.Dropout])
            return make(), width
        if kind == "pool":
            pools: Any = rng.choice([AVG_POOL, MAX_POOL])
            return pools[rank](3, 1, 1), width
        if kind == "depthwise":
            spread = 2 if width <= 4 and rng.random() < 0.4 else 1
            layers: Any = rng.choice([CONV, TRANSPOSED])
            return layers[rank](width, width * spread, 3, padding=1, groups=width, bias=bias), width * spread
        if kind == "grouped" and width % 2 == 0 and size % 2 == 0:
            convolutions: Any = rng.choice([CONV, TRANSPOSED])
            return convolutions[rank](width, size, 3, padding=1, groups=2, bias=bias), size
        if kind == "transposed":
            return TRANSPOSED[rank](width, size, 3, padding=1, bias=bias), size
        kernel, padding = rng.choice([(1, 0), (3, 1)])
        layer = partial(CONV[rank], padding_mode="replicate") if padding and rng.random() < 0.3 else CONV[rank]
        return layer(width, size, kernel, padding=padding, bias=bias), size

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        maps = [x, x[:, :2] * 2 if extra is None else extra]
        for kind, part, sources in self.program:
            maps.append(self._step(kind, part, [maps[source] for source in sources]))
        pooled = torch.cat([maps[leaf].flatten(2).mean(2) for leaf in self.leaves], 1)
        out = self.fc(pooled)
        if self.aside is not None and self.training:
            return out, {"aux": self.aux(self.norm(maps[self.aside].flatten(2).amax(2)))}
        return out

    def _step(self, kind: str, part: int | None, maps: list[Tensor]) -> Tensor:
        if part is not None:
            result: Tensor = self.parts[part](maps[0])
            return result
        x, half = maps[0], maps[0].shape[1] // 2
        if kind == "add":
            return x + maps[1]
        if kind == "mul":
            return x * maps[1]
        if kind == "gate":
            return x * maps[1].mean(list(range(2, x.ndim)), keepdim=True).sigmoid()
        if kind == "cat":
            return torch.cat(maps, 1)
        if kind.startswith("halves"):
            return x.chunk(2, 1)[int(kind[-1])]
        if kind.startswith("slices"):
            return x[:, :half] if kind[-1] == "0" else x[:, half:]
        return x.view(len(x), 2, half, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


KINDS = [
    *["conv", "norm", "norm", "activation"] * 3,
    *"add add cat cat mul gate halves slices shuffle again again pool depthwise grouped transposed".split(),
]


@st.composite
def dags(draw: st.DrawFn) -> Case:
    number = st.integers(0, 11)
    rank = draw(st.sampled_from([1, 1, 2]))
    steps = draw(st.lists(st.tuples(st.sampled_from(KINDS), number, number, number), min_size=3, max_size=24))
    bias = draw(st.sampled_from(BIASES))
    together = draw(st.booleans())
    seed = draw(st.integers(0, 2**31))
    rng = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unread = rng.choice([0.0, 0.0, 0.5])
        network = Dag(steps, rank, rng, unread).double()
        randomize(network)
        for parameter in network.parameters():
            parameter.requires_grad_(rng.random() < 0.95)
        for module in network.modules():
            module.training = rng.random() < 0.5
            if isinstance(module, nn.ReLU | nn.LeakyReLU):
                module.inplace = False  # what another step reads must not be written to
        example = torch.randn(4, 4, *[5] * rank).double()
        keep = masks(network, example, rng, rng.choice([0.3, 0.5, 0.9]), together)
    return Case(network, keep, example, True, bias, unread > 0)


def masked_copy(network: nn.Module, keep: dict[str, Tensor], bias: str) -> Any:
    network = copy.deepcopy(network)
    with torch.no_grad():
        for name, kept in keep.items():
            module: Any = network.get_submodule(name)
            module.weight[~kept] = 0
            if bias == "zero":
                module.bias[~kept] = 0
    return network


class SameForAllChannels(nn.Module):
    """Dropout that networks of different widths can draw alike."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand([len(x), *[1] * (x.ndim - 1)], dtype=x.dtype) < 0.7) / 0.7 if self.training else x


def with_comparable_dropout(network: Any) -> Any:
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, module in parent.named_children():
            if isinstance(module, nn.Dropout):
                setattr(parent, name, SameForAllChannels())
    return network


def train_outputs(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs of a train-mode pass that leaves gradients, and writes to the running statistics."""
    network.train()
    torch.manual_seed(0)  # the same noise
    leaves = [leaf for leaf in pytree.tree_leaves(network(x)) if isinstance(leaf, Tensor)]
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(())
    for leaf in leaves:
        total = total + (leaf * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)).sum()
    if total.requires_grad:
        total.backward()
    return [leaf.detach() for leaf in leaves]


def check_training(masked: nn.Module, slimmed: nn.Module, case: Case, plan: SlimmingPlan) -> None:
    masked, slimmed = with_comparable_dropout(masked), with_comparable_dropout(slimmed)
    x = case.example
    try:
        expected = train_outputs(masked, x)
    except RuntimeError as error:  # two in-place activations in a row cannot be trained, slim or not
        assert "inplace" in str(error)
        return
    assert difference(expected, train_outputs(slimmed, x)) < 1e-7
    own = dict(slimmed.named_parameters())
    pruned = {f"{name}.{part}": ~kept for name, kept in case.keep.items() for part in ("weight", "bias")}
    carriers = {
        f"{name}.{part}"
        for name, module in masked.named_modules()
        if isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels
        for part in ("weight", "bias")
    }
    gradients = {name: p.grad for name, p in masked.named_parameters() if p.grad is not None}
    scale = max((float(gradient.abs().max()) for gradient in gradients.values()), default=1.0)
    for name, parameter in masked.named_parameters():
        gradient, found = parameter.grad, own[name].grad
        if gradient is None or found is None:
            assert (gradient is None) == (found is None) or gradient is None or not bool(gradient.any())
            continue
        if name in pruned:
            gradient[pruned[name]] = 0
            found[plan.cut(name, pruned[name])] = 0
        if name in carriers:  # see test_gradients_of_a_depthwise_bias_are_those_of_the_masked_network
            continue
        assert float((plan.cut(name, gradient) - found).abs().max()) < 1e-7 * max(scale, 1.0), name
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        batch = torch.randn(x.shape, generator=generator).double()
        for network in (masked, slimmed):
            torch.manual_seed(0)
            network(batch)
    if case.dead:
        return
    buffers = dict(slimmed.named_buffers())
    for name, buffer in masked.named_buffers():
        if buffer.is_floating_point():
            norm = name.rpartition(".")[0]
            on = torch.ones_like(buffer, dtype=torch.bool)
            # The statistics of channels that are multiplied by zero, and stay so, or that nobody reads, say nothing.
            if (scale := getattr(masked.get_submodule(norm), "weight", None)) is not None:
                read = gradients.get(f"{norm}.weight")
                on = (scale.detach() != 0) & (torch.zeros_like(on) if read is None else read != 0)
            on = plan.cut(name, on)
            assert torch.allclose(plan.cut(name, buffer)[on], buffers[name][on], rtol=1e-8, atol=1e-8), name
        else:
            assert torch.equal(buffer, buffers[name]), name


def check_slimming(case: Case) -> None:
    network, example = case.network, case.example
    full = copy.deepcopy(network)
    masked = masked_copy(network, case.keep, case.bias)
    modes = [module.training for module in network.modules()]
    flags = {name: p.requires_grad for name, p in network.named_parameters()}
    state = torch.get_rng_state()
    plan = slim(network, case.keep, example, case.bias)
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in network.modules()] == modes
    assert {name: p.requires_grad for name, p in network.named_parameters() if name in flags} == flags
    assert sizes_match(network) and sharing(network) >= sharing(full)
    generator = torch.Generator().manual_seed(1)
    for batch, more in [(1, 0), (3, 3 * case.any_size)]:
        x = torch.randn(batch, 4, *(size + more for size in example.shape[2:]), generator=generator).double() * 2
        assert difference(outputs(masked, x), outputs(network, x)) < 1e-9
    check_training(masked, network, case, plan)
    added = sum(len(network.get_submodule(name).bias) for name in plan.biases)
    assert sum(p.numel() for p in network.parameters()) <= sum(p.numel() for p in full.parameters()) + added
    assert SlimmingPlan.from_json(plan.to_json()) == plan
    assert difference(outputs(network, example), outputs(copy.deepcopy(network), example)) == 0


def mask(channels: int, *pruned: int) -> Tensor:
    kept = torch.ones(channels, dtype=torch.bool)
    kept[list(pruned)] = False
    return kept


def plain(padding: int = 1, bias: bool = False) -> Any:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=bias),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=padding, bias=bias),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )
    randomize(network)
    return network


KEPT = mask(8, 0, 1, 4)


def sizes_match(network: nn.Module) -> bool:
    for module in network.modules():
        if isinstance(module, nn.Linear):
            ok = module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, _ConvTransposeNd):
            ok = module.weight.shape[:2] == (module.in_channels, module.out_channels // module.groups)
        elif isinstance(module, _ConvNd):
            ok = module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, _BatchNorm):
            ok = module.running_mean.shape == (module.num_features,)
        else:
            continue
        if isinstance(module, nn.Linear | _ConvNd) and module.bias is not None:
            ok = ok and len(module.bias) == getattr(module, "out_features", getattr(module, "out_channels", None))
        if not ok:
            return False
    return True


def sharing(network: nn.Module) -> set[frozenset[str]]:
    places: dict[int, set[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), set()).add(name)
    return {frozenset(names) for names in places.values()}


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 3, padding=1)
