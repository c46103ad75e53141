"""Hidden units and channels without batch norms: what is removed is what rows of zeros would have done."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_fscreen import find_gates, load_slimmed, save_slimmed, slim
from lightning_fscreen.slimming import Gate
from tests.slimming.masked import CASES


class Residual(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Gated(nn.Module):
    """SwiGLU, of two layers or of one whose output is split."""

    def __init__(self, width: int, hidden: int, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.up = nn.Linear(width, 2 * hidden if fused else hidden)
        self.gate = nn.Identity() if fused else nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, -1) if self.fused else (self.up(x), self.gate(x))
        return self.down(functional.silu(gate) * value)


class Scaled(nn.Module):
    """A scale for every channel, as in ConvNeXt and CaiT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Attention(nn.Module):
    """Tokens that attend to each other, or to inputs of another width."""

    def __init__(self, width: int, **settings: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True, **settings)
        self.other = nn.Linear(width, settings["kdim"]) if settings else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        other = self.other(x)
        return x + self.attention(x, other, other)[0]


class Product(nn.Module):
    """A linear layer written as a product, with the constants of what it reads in the bias or in none."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)


class Conv1D(nn.Module):
    """GPT-2's linear layer, as transformers writes it: its weight is (in, out), its size an attribute."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nx, self.nf = inputs, outputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


def convolutions(rank: int) -> tuple[type[nn.Module], type[nn.Module]]:
    return getattr(nn, f"Conv{rank}d"), getattr(nn, f"ConvTranspose{rank}d")


def chain(rank: int, norm: str = "", padding: int = 1) -> nn.Sequential:
    """Dense, grouped, depthwise and transposed convolutions."""
    conv, transposed = convolutions(rank)
    norms = {
        "": nn.Identity,
        "group": lambda: nn.GroupNorm(4, 8),
        "instance": lambda: getattr(nn, f"InstanceNorm{rank}d")(8, affine=True),
        "batch": lambda: getattr(nn, f"BatchNorm{rank}d")(8),
    }
    layers = [
        *(conv(3, 8, 3, padding=padding), norms[norm](), nn.ReLU()),
        *(conv(8, 8, 3, padding=padding, groups=8), norms[norm](), nn.SiLU()),
        *(conv(8, 8, 1), norms[norm](), nn.Sigmoid(), conv(8, 12, 1, groups=2), nn.ReLU()),
        *(transposed(12, 6, 2, groups=2), nn.Tanh(), transposed(6, 5, 2), nn.ReLU(), conv(5, 2, 1)),
    ]
    return nn.Sequential(*layers)


def transformer(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    )
    return nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 3))


NETWORKS = {
    "an MLP": (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 9), nn.GELU(), nn.Linear(9, 3)), (6,)),
    "no biases": (
        lambda: nn.Sequential(
            nn.Linear(6, 16, bias=False), nn.ReLU(), nn.Linear(16, 9, bias=False), nn.Sigmoid(), nn.Linear(9, 3)
        ),
        (6,),
    ),
    **{f"convolutions, {rank}-d": (lambda rank=rank: chain(rank), (3,) + (7,) * rank) for rank in (1, 2, 3)},
    **{
        f"convolutions, {norm} norms": (lambda norm=norm: chain(2, norm), (3, 7, 7))
        for norm in ("group", "instance", "batch")
    },
    "group norms, no padding": (lambda: chain(2, "group", padding=0), (3, 9, 9)),
    "gated, two layers": (lambda: nn.Sequential(nn.Linear(6, 8), Residual(Gated(8, 12, False)), nn.Linear(8, 3)), (6,)),
    "gated, one layer": (lambda: nn.Sequential(nn.Linear(6, 8), Residual(Gated(8, 12, True)), nn.Linear(8, 3)), (6,)),
    "a transformer, norm first": (lambda: transformer(True), (5, 4)),
    "a transformer, norm last": (lambda: transformer(False), (5, 4)),
    "a ConvNeXt block": (
        lambda: nn.Sequential(
            nn.Linear(3, 8),
            Residual(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8), Scaled(8)),
            nn.Linear(8, 2),
        ),
        (4, 3),
    ),
    "a stream without norms": (
        lambda: nn.Sequential(nn.Linear(6, 8), Residual(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 3)),
        (6,),
    ),
    "gated linear units": (
        lambda: nn.Sequential(nn.Linear(6, 24), nn.GLU(), nn.Linear(12, 10), nn.GLU(), nn.Linear(5, 3)),
        (6,),
    ),
    "gated channels": (lambda: nn.Sequential(nn.Conv2d(3, 12, 3), nn.GLU(1), nn.Conv2d(6, 2, 3)), (3, 5, 5)),
    "products": (
        lambda: nn.Sequential(
            *(nn.Linear(6, 9), nn.Tanh(), Product(9, 8, bias=True), nn.Linear(8, 7), nn.Tanh()),
            *(Product(7, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)),
        ),
        (6,),
    ),
    "GPT-2's layers": (
        lambda: nn.Sequential(nn.Linear(3, 8), Residual(Conv1D(8, 20), nn.GELU(), Conv1D(20, 8)), nn.Linear(8, 2)),
        (5, 3),
    ),
    "shuffled channels": (
        lambda: nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.ChannelShuffle(3), nn.Conv2d(12, 2, 1)),
        (3, 5, 5),
    ),
    "shuffled pixels": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 12, 3, padding=1), nn.Sigmoid(), nn.PixelShuffle(2), nn.Conv2d(3, 4, 1), nn.ReLU()),
            *(nn.PixelUnshuffle(2), nn.Conv2d(16, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)),
        ),
        (3, 4, 4),
    ),
    "attention without norms": (lambda: nn.Sequential(nn.Linear(4, 8), Attention(8), nn.Linear(8, 3)), (5, 4)),
    "attention to another width": (
        lambda: nn.Sequential(nn.Linear(4, 8), Attention(8, kdim=6, vdim=6), nn.Linear(8, 3)),
        (5, 4),
    ),
    "a normalised branch of a stream": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            *(Residual(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)), nn.SiLU()),
            *(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)),
        ),
        (3, 5, 5),
    ),
    "a batch norm in a part": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 12),
            nn.ReLU(),
            nn.Linear(12, 2),
        ),
        (3, 5, 5),
    ),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    net = make().double()
    for module in net.modules():
        if isinstance(module, _BatchNorm | nn.GroupNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return net, torch.randn(3, *shape, dtype=torch.float64)


def random_masks(gates: list[Gate], amount: float, seed: int) -> dict[str, Tensor]:
    """Units that share a number share their fate; no gate is emptied."""
    generator = torch.Generator().manual_seed(seed)
    pruned = {unit: bool(torch.rand((), generator=generator) < amount) for gate in gates for unit in gate.units}
    pruned[-1] = False
    masks = {gate.name: torch.tensor([not pruned[unit] for unit in gate.units]) for gate in gates}
    emptied = {unit for gate in gates if not masks[gate.name].any() for unit in gate.units}
    return {gate.name: torch.tensor([not pruned[u] or u in emptied for u in gate.units]) for gate in gates}


@torch.no_grad()
def masked(net: nn.Module, masks: dict[str, Tensor], bias: str) -> nn.Module:
    """The network with zeros in it, by a loop over units."""
    net = copy.deepcopy(net)
    for name, mask in masks.items():
        module = net.get_submodule(name)
        for unit in (~mask).nonzero().flatten().tolist():
            if isinstance(module, _ConvTransposeNd):
                outputs, inputs = module.out_channels // module.groups, module.in_channels // module.groups
                group, column = divmod(unit, outputs)
                module.weight[group * inputs : (group + 1) * inputs, column] = 0
            elif isinstance(module, Conv1D):
                module.weight[:, unit] = 0
            elif isinstance(module, nn.MultiheadAttention):
                module.out_proj.weight[:, unit * module.head_dim : (unit + 1) * module.head_dim] = 0
                continue
            else:
                module.weight[unit] = 0
            if bias == "zero" and module.bias is not None:
                module.bias[unit] = 0
    return net


def check(net: nn.Module, inputs: Tensor, amount: float, seed: int, bias: str) -> int:
    """Slim a network at random, compare it with the masked one; returns the number of parameters that went."""
    masks = random_masks(find_gates(net, inputs), amount, seed)
    reference, before = masked(net, masks, bias), sum(p.numel() for p in net.parameters())
    slim(net, masks, inputs, bias=bias)
    for training in (True, False):
        with torch.no_grad():
            torch.testing.assert_close(
                net.train(training)(inputs), reference.train(training)(inputs), rtol=1e-9, atol=1e-9
            )
    return before - sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("bias", ["zero", "fold"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_left_computes_what_the_masked_network_does(name: str, bias: str) -> None:
    net, inputs = build(name)
    removed = check(net, inputs, 0.5, 1, bias)
    assert removed > 0 or (bias == "fold" and name.startswith("products"))  # these cannot take constants


@pytest.mark.parametrize(
    ("name", "free"),
    {
        "an MLP": ["0", "2"],
        "convolutions, 2-d": ["0", "3", "9", "11", "13"],
        "convolutions, group norms": ["0", "3", "9", "11", "13"],
        "gated, two layers": ["0", "1.inner.0.up", "1.inner.0.gate", "1.inner.0.down"],
        "a transformer, norm first": ["1.self_attn", "1.linear1"],
        "a ConvNeXt block": ["1.inner.1"],
        "attention without norms": ["1.attention"],
        "attention to another width": ["1.attention", "1.other"],
        "a normalised branch of a stream": ["0", "1.inner.1", "4"],
        "a batch norm in a part": ["1", "4"],
        "gated linear units": ["0", "2"],
        "products": ["0", "3"],
        "GPT-2's layers": ["0", "1.inner.0", "1.inner.2"],
        "shuffled channels": ["0"],
        "shuffled pixels": ["0", "3", "6"],
    }.items(),
)
def test_what_can_go_is_found(name: str, free: list[str]) -> None:
    net, inputs = build(name)
    gates = find_gates(net, inputs)
    assert [gate.name for gate in gates if gate.excluded is None] == free
    for gate in gates:
        kinds = {_BatchNorm: "channel", nn.MultiheadAttention: "head", nn.Module: "neuron"}
        module = net.get_submodule(gate.name)
        assert gate.kind == next(kind for layer, kind in kinds.items() if isinstance(module, layer))


def test_half_of_the_neurons_leave_half_of_every_layer() -> None:
    net, inputs = build("convolutions, 2-d")
    keep = {"0": torch.arange(8) % 2 == 0, "3": torch.arange(8) % 2 == 0, "6": torch.arange(8) < 4}
    plan = slim(net, keep, inputs)
    assert [tuple(net[index].weight.shape[:2]) for index in (0, 3, 6)] == [(4, 3), (4, 1), (8, 4)]
    assert list(plan.kept_for) == ["6"] and "together with" in plan.kept_for["6"]  # a grouped convolution reads it


def test_a_fresh_network_with_sizes_in_attributes_takes_the_size_of_a_slim_one(tmp_path: Path) -> None:
    net, inputs = build("GPT-2's layers")
    slim(net, {"1.inner.0": torch.arange(20) % 3 > 0}, inputs)
    assert net[1].inner[0].nf == 13 and net[1].inner[0].weight.shape == (8, 13)
    save_slimmed(net, tmp_path / "slim.safetensors")
    again = load_slimmed(build("GPT-2's layers")[0], tmp_path / "slim.safetensors")
    torch.testing.assert_close(again(inputs), net(inputs))


def test_branches_of_a_gated_layer_share_their_units() -> None:
    for name, layers in (("gated, two layers", ["1.inner.0.up", "1.inner.0.gate"]), ("gated, one layer", [])):
        net, inputs = build(name)
        gates = {gate.name: gate for gate in find_gates(net, inputs)}
        first = gates["1.inner.0.up"].units
        assert gates[layers[1]].units == first if layers else first[:12] == first[12:]


def test_a_half_that_is_pruned_without_the_other_says_why_it_stays() -> None:
    net, inputs = build("gated, two layers")
    plan = slim(net, {"1.inner.0.down": torch.arange(8) > 0}, inputs)
    assert "can only go together with neurons of '0'" in plan.kept_for["1.inner.0.down"]


def test_whole_groups_of_a_group_norm_go() -> None:
    net, inputs = build("group norms, no padding")
    slim(net, {name: torch.arange(8) >= 2 for name in ("0", "3")}, inputs)
    assert (net[1].num_groups, net[1].num_channels, len(net[1].weight)) == (3, 6, 6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda net: net[0].weight.requires_grad_(False), "frozen"),
        (lambda net: setattr(net[2], "weight", net[0].weight), "shares its weight with '0'"),
        (lambda net: nn.utils.parametrizations.weight_norm(net[0]), "parametrization"),
        (lambda net: net.insert(1, nn.LayerNorm(8)), "normalises over all channels"),
        (lambda net: net.insert(1, nn.GroupNorm(1, 8)), "normalises over all channels"),
        (lambda net: net.insert(1, nn.Softmax(-1)), "normalises over all channels"),
    ],
)
def test_a_layer_that_cannot_lose_units_keeps_them_and_says_why(change, reason: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU())
    net.append(nn.Linear(6, 2))
    change(net)
    net, inputs = net.double(), torch.randn(3, 8, dtype=torch.float64)
    assert any(reason in (gate.excluded or "") for gate in find_gates(net, inputs))
    assert check(net, inputs, 0.5, 0, "zero") > 0  # the others go


def test_a_weight_that_forward_computes_with_is_no_unreached_layer() -> None:
    class Standardised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight / self.weight.norm(), self.bias)

    net = nn.Sequential(Standardised(6, 8), nn.ReLU(), nn.Linear(8, 2))
    assert "computes another weight from its own" in str(find_gates(net, torch.randn(2, 6))[0].excluded)


@pytest.mark.parametrize("mask", [torch.ones(15).bool(), torch.zeros(16).bool(), torch.ones(16)])
def test_a_mask_that_does_not_fit_changes_nothing(mask: Tensor) -> None:
    net, inputs = build("an MLP")
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="keep\\['0'\\]"):
        slim(net, {"0": mask}, inputs)
    torch.testing.assert_close(dict(net.state_dict()), dict(before), rtol=0, atol=0)


def test_the_optimizer_follows() -> None:
    """The next steps are those of the masked network, whose pruned rows are held at zero."""
    net, inputs = build("an MLP")
    keep = {"0": torch.arange(16) % 3 > 0}
    reference = masked(net, keep, "zero")
    ours, theirs = (torch.optim.Adam(part.parameters(), lr=0.01) for part in (net, reference))

    def step(part: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        part(inputs).square().sum().backward()
        optimizer.step()

    slim(net, keep, inputs, optimizers=ours)
    for _ in range(5):
        step(net, ours)
        step(reference, theirs)
        with torch.no_grad():  # ReLU has no gradient at zero, so that nothing else moves
            reference[0].weight[~keep["0"]] = reference[0].bias[~keep["0"]] = 0
    torch.testing.assert_close(net(inputs), reference(inputs), rtol=1e-9, atol=1e-9)


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Random chains and residual blocks with all kinds of norms, or none."""
    width = draw(st.sampled_from([4, 8]))
    norms = {
        "none": nn.Identity,
        "layer": lambda: nn.LayerNorm(width),
        "rms": lambda: nn.RMSNorm(width),
        "group": lambda: nn.GroupNorm(draw(st.sampled_from([1, 2, 4])), width),
        "batch": lambda: nn.BatchNorm1d(width),
        "scale": lambda: Scaled(width),
    }
    activations = st.sampled_from([nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Identity])
    layers: list[nn.Module] = [nn.Linear(3, width, bias=draw(st.booleans()))]
    for _ in range(draw(st.integers(1, 4))):
        norm, activation = norms[draw(st.sampled_from(list(norms)))], draw(activations)
        hidden = draw(st.integers(2, 6))
        block = draw(st.sampled_from(["chain", "residual", "mlp", "gated", "fused", "glu", "product"]))
        one = nn.Linear(width, width, bias=draw(st.booleans()))
        if block == "chain":
            layers += [one, norm(), activation()]
        elif block == "residual":
            layers.append(Residual(norm(), one, activation()))
        elif block == "glu":
            layers += [nn.Linear(width, 2 * width), nn.GLU(), norm()]
        elif block == "product":
            layers += [norm(), Product(width, width, draw(st.booleans())), activation()]
        elif block == "mlp":
            layers.append(Residual(norm(), nn.Linear(width, hidden), activation(), nn.Linear(hidden, width)))
        else:
            layers.append(Residual(norm(), Gated(width, hidden, block == "fused")))
    return nn.Sequential(*layers, nn.Linear(width, 2))


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.floats(0.1, 0.9), st.integers(0, 99), st.sampled_from(["zero", "fold"]))
def test_any_network_keeps_the_function_of_the_masked_one(net: nn.Module, amount: float, seed: int, bias: str) -> None:
    torch.manual_seed(seed)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    check(net.double(), torch.randn(4, 3, dtype=torch.float64), amount, seed, bias)


def test_entries_of_a_table_stay_also_where_an_output_layer_shares_it() -> None:
    """They are looked up by their numbers, which cutting would change."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.hidden = nn.Embedding(12, 8), nn.Linear(8, 8)
            self.out, self.last = nn.Linear(8, 12, bias=False), nn.Linear(12, 3)
            self.out.weight = self.table.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.last(self.out(self.hidden(self.table(x)).relu()).mean(1))
            return out

    gates = {gate.name: gate for gate in find_gates(Tied(), torch.randint(12, (2, 5)))}
    assert gates["out"].excluded is not None and "looked up by its number" in gates["out"].excluded


class Turned(nn.Linear):
    """A layer that is written as a product with its transposed weight; as transformers' Falcon is."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Written(nn.Module):
    """Functions read the weights of layers, without their forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(functional.gelu(self.first(x)), self.second.weight)
        return functional.linear(functional.gelu(self.first(x)), self.first.weight.permute(1, 0), self.first.bias[:6])


@pytest.mark.parametrize("bias", ["zero", "fold"])
@pytest.mark.parametrize("own", [True, False])
def test_products_with_transposed_weights_are_linear_layers(bias: str, own: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Turned(6, 16, own), nn.GELU(), Turned(16, 12, own), nn.GELU(), Turned(12, 3, own)).double()
    assert check(net, torch.randn(5, 6).double(), 0.5, 0, bias) > 0
    assert net[2].weight.shape[1] == net[0].out_features < 16 and net[4].weight.shape[1] == net[2].out_features < 12


def test_a_layer_that_is_not_called_takes_no_new_bias() -> None:
    """Nobody would add it: units stay whose constants it would have to carry, and all others go."""
    torch.manual_seed(0)
    net, x = nn.Sequential(Written(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double(), torch.randn(5, 6).double()
    assert check(net, x, 0.5, 0, "fold") > 0
    assert net[0].first.out_features == 16 and net[1].out_features < 8
