"""Attention heads: what is left computes what the network computes with zeros in the columns that read a head."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_fscreen import find_gates, load_slimmed, save_slimmed, slim
from lightning_fscreen.slimming import Gate, SlimmingPlan, remove_dead_units
from lightning_fscreen.slimming.carried import plan_of
from lightning_fscreen.slimming.plan import PlanError
from lightning_fscreen.slimming.resize import slim_like
from tests.slimming import difference, outputs
from tests.slimming.attentions import PRODUCTS, SIZES, Attention, Block, Torch, masked, random_block, random_keep
from tests.slimming.masked import CASES


def attention(sizes: str = "inferred", product: str = "matmul", **settings: Any) -> Block:
    torch.manual_seed(0)
    given = {"fused": True, "bias": True, "extra": "", "causal": False, "groups": 4, **settings}
    return Block(16, Attention(16, 4, 4, given.pop("groups"), product, sizes, **given), cross=False).double()


def inputs(block: Block, count: int = 2, length: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, length, block.head.in_features, dtype=torch.float64, generator=generator)


def check(block: Block, seed: int, gates: list[Gate] | None = None) -> tuple[Any, SlimmingPlan]:
    """Slim a block at random, compare it with the masked one; returns the latter, and the plan."""
    batches = inputs(block), inputs(block, 3, 7)
    gates = gates or find_gates(block, batches[0])
    keep = random_keep(gates, seed)
    reference = masked(block, gates, keep)
    plan = slim(block, keep, batches[0])
    for batch in batches:
        for training in (False, True):
            found, expected = block.train(training)(batch), reference.train(training)(batch)
            assert difference([expected], [found]) < 1e-9
    return reference, plan


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**31))
@example(3056)
def test_any_attention_computes_the_same(seed: int) -> None:
    block = random_block(seed)
    fresh = copy.deepcopy(block)
    found = find_gates(block, inputs(block))
    heads = [gate for gate in found if gate.kind == "head"]
    if not heads:  # one complex number for each query, and one key for all of them
        inner: Any = block.attention
        assert (inner.extra, inner.head_dim, inner.num_groups) == ("complex", 2, 1)
        assert any("complex numbers" in (gate.excluded or "") for gate in found)
        return
    (gate,) = heads
    assert gate.excluded is None and gate.projection in ("attention.projection", "attention.attention.out_proj")
    check(block, seed, found)
    mask = torch.tensor([unit == gate.units[0] for unit in gate.units])
    reference = masked(fresh, [gate], {gate.name: mask})
    slim(fresh, {gate.name: mask}, inputs(block))
    assert difference(outputs(reference, inputs(block)), outputs(fresh, inputs(block))) < 1e-9
    before, after = (sum(p.numel() for p in net.parameters()) for net in (reference, fresh))
    assert after < before


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_head_goes_from_all_weights(sizes: str, product: str) -> None:
    block = attention(sizes, product, extra="scale")
    (gate,) = (gate for gate in find_gates(block, inputs(block)) if gate.kind == "head")
    assert (gate.name, gate.channels, gate.projection) == ("attention", 4, "attention.projection")
    plan = slim(block, {"attention": torch.tensor([True, False, False, True])}, inputs(block))
    inner: Any = block.attention
    assert inner.qkv.weight.shape == (24, 16) and inner.projection.weight.shape == (16, 8)
    assert inner.scale.shape == (2, 1, 1) and plan.removed["attention"] == 2


def test_groups_of_queries_share_their_fate() -> None:
    block = attention(fused=False, groups=2)
    (gate,) = (gate for gate in find_gates(block, inputs(block)) if gate.kind == "head")
    first, second, third, fourth = gate.units
    assert first == second != third == fourth
    layers = {gate.name: gate.excluded for gate in find_gates(block, inputs(block)) if gate.kind == "neuron"}
    assert layers["attention.key"] == "its outputs belong to the heads of 'attention', which are pruned as a whole"


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("torchs_own", [False, True])
def test_the_plan_says_all(sizes: str, torchs_own: bool, tmp_path: Path) -> None:
    """Saved, loaded, made full again, slimmed twice, copied, pickled, compiled and exported: equal outputs."""

    def fresh() -> Block:
        own = Torch(16, 4, weights=False, batch_first=True)
        return Block(16, own, cross=False).double() if torchs_own else attention(sizes)

    block, x = fresh(), inputs(fresh())
    check(block, 1)
    check(block, 2)
    expected = outputs(block, x)
    loaded = fresh()
    save_slimmed(block, tmp_path / "block.safetensors")
    load_slimmed(loaded, tmp_path / "block.safetensors")
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    copied, pickled = copy.deepcopy(block), torch.load(buffer, weights_only=False)
    full, dense = copy.deepcopy(block), fresh()
    with torch.no_grad():
        for parameter in block.parameters():  # copies have values of their own
            parameter.add_(1)
    for network in (loaded, copied, pickled):
        assert difference(expected, outputs(network, x)) == 0
    full.load_state_dict(dense.state_dict())
    assert difference(outputs(dense, x), outputs(full, x)) == 0
    expected = outputs(block, x)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(block.eval(), (x,)).module()
    with torch.no_grad():
        assert difference(expected, [compiled(x)]) < 1e-12
        assert difference(expected, [exported(x)]) < 1e-12


def test_a_damaged_plan_is_refused() -> None:
    block = attention("of the stream")
    _, plan = check(block, 0)
    assert plan.sizes
    (size, *_) = plan.sizes["attention"]
    for changes in ({"before": size.after}, {"after": 0}, {"place": -1}, {"place": 5}):
        damaged = SlimmingPlan.from_json(replace(plan, sizes={"attention": (replace(size, **changes),)}).to_json())
        with pytest.raises(PlanError, match="which is no other size"):
            slim_like(attention("of the stream"), damaged)
    with pytest.raises(PlanError, match="changes sizes in 'other', which Block does not have"):
        slim_like(attention("of the stream"), replace(plan, sizes={"other": (size,)}))


class Normed(nn.Module):
    """Attention over channels first, a batch norm between its heads and the layer that reads them; as BoTNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Conv1d(16, 48, 1), nn.BatchNorm1d(16)
        self.projection, self.head = nn.Conv1d(16, 6, 3, padding=1), nn.Conv1d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), 3, 4, 4, -1).unbind(1)
        attended = (v @ (q.transpose(-2, -1) @ k).softmax(-1).transpose(-2, -1)).flatten(1, 2)
        return self.head(self.projection(self.norm(attended).relu()).relu())


@pytest.mark.parametrize("name", ["projection.heads", "norm"])
def test_a_batch_norm_behind_heads_goes_with_them(name: str) -> None:
    torch.manual_seed(0)
    network, x = Normed().double(), torch.randn(3, 16, 7, dtype=torch.float64)
    gates = {gate.name: gate for gate in find_gates(network, x)}
    heads, channels = gates["projection.heads"].units, gates["norm"].units
    assert channels == tuple(unit for unit in heads for _ in range(4)) and len(set(heads)) == 4
    keep = {name: torch.tensor([unit in heads[1:3] for unit in gates[name].units])}
    reference = masked(network, list(gates.values()), keep)
    slim(network, keep, x)
    assert (network.qkv.out_channels, network.norm.num_features, network.projection.in_channels) == (24, 8, 8)
    for training in (False, True):
        found, expected = network.train(training)(x), reference.train(training)(x)
        assert difference([expected], [found]) < 1e-9


def test_columns_that_read_heads_in_turns_are_units_that_share_their_fate() -> None:
    block = attention(turns=True)
    (gate,) = (gate for gate in find_gates(block, inputs(block)) if gate.kind == "head")
    assert gate.channels == 16 and gate.units == 4 * gate.units[:4] and len(set(gate.units)) == 4
    check(block, 0)
    inner: Any = block.attention
    assert inner.projection.in_features < 16


class Distances(nn.Module):
    """A bias of zeros whose size is an attribute; another attribute happens to be as large as all heads together."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_buckets = 4, 16
        self.qkv, self.projection, self.head = nn.Linear(8, 48), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        bias = torch.zeros(1, self.num_heads, x.shape[1], x.shape[1], dtype=x.dtype)
        bias = bias + (torch.arange(x.shape[1]) * 5 % self.num_buckets).to(x.dtype)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, bias)
        logits: Tensor = self.head((x + self.projection(attended.transpose(1, 2).flatten(2))).mean(1))
        return logits


def test_only_numbers_that_calls_are_given_follow() -> None:
    torch.manual_seed(0)
    network, x = Distances().double(), torch.randn(2, 6, 8, dtype=torch.float64)
    keep = {"projection.heads": torch.tensor([True, False, False, True])}
    reference = masked(network, find_gates(network, x), keep)
    plan = slim(network, keep, x)
    assert network.projection.in_features == 8 and (network.num_heads, network.num_buckets) == (2, 16)
    assert plan.attributes == {"": {"num_heads": (4, 2)}} and difference([reference(x)], [network(x)]) < 1e-9


class Asking(Block):
    """Its queries are zeros and its mask is one of zeros: it takes the mean of all values."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mask = torch.zeros_like(x[:, :1, :1].unsqueeze(1).expand(-1, 1, x.shape[1], x.shape[1]))
        attended = nn.functional.scaled_dot_product_attention(torch.zeros_like(q), k, v, mask)
        return self.head(self.mlp(self.attention.projection(attended.transpose(1, 2).flatten(2))).mean(1))


def test_queries_of_zeros_are_no_values_of_zeros() -> None:
    block = Asking(16, attention().attention, cross=False).double()
    (gate,) = (gate for gate in find_gates(block, inputs(block)) if gate.kind == "head")
    keep = {gate.name: torch.tensor([True, False, False, True])}
    reference, x = masked(block, [gate], keep), inputs(block)
    slim(block, keep, x)
    inner: Any = block.attention
    assert inner.qkv.weight.shape == (24, 16) and difference(outputs(reference, x), outputs(block, x)) < 1e-9


class Weights(nn.Module):
    """Attention weights are an output, too."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.linear = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        out, weights = self.attention(x, x, x)
        return self.head(self.linear(out).relu()), weights


class Talking(Block):
    """A layer mixes the heads."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        weights = self.talk((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        return self.head(self.mlp(self.attention.projection((weights @ v).transpose(1, 2).flatten(2))).mean(1))


def frozen() -> Block:
    block = attention()
    block.attention.projection.weight.requires_grad_(False)
    return block


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: Weights().double(),
            "operation 'mean' in module 'attention': it averages over all channels, and it is used more than once",
        ),
        (frozen, "the layer that projects its heads, 'attention.projection': frozen (requires_grad is False)"),
    ],
)
def test_attention_that_keeps_its_heads_says_why(make: Any, reason: str) -> None:
    block = make()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    gates = find_gates(block, x)
    assert [gate.excluded for gate in gates if gate.kind == "head"] == [reason]
    free = [gate for gate in gates if gate.excluded is None]
    assert [gate.kind for gate in free] == ["neuron"]
    keep = {free[0].name: torch.arange(free[0].channels) < 4}
    reference = masked(block, gates, keep)
    slim(block, keep, x)
    assert difference(outputs(reference, x), outputs(block, x)) < 1e-9


def test_heads_that_a_layer_mixes_go_on_both_sides_of_it() -> None:
    torch.manual_seed(0)
    block = Talking(16, attention().attention, cross=False).double()
    block.talk = nn.Linear(4, 4).double()
    names = [gate.name for gate in find_gates(block, inputs(block)) if gate.kind == "head" and gate.excluded is None]
    assert names == ["attention.projection.heads", "talk.heads"]
    check(block, 0)
    talk: Any = block.talk
    assert talk.weight.numel() < 16


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"attention": torch.ones(3, dtype=torch.bool)}, r"keep\['attention'\] must be a bool tensor of shape \(4,\)"),
        ({"attention": torch.zeros(4, dtype=torch.bool)}, "keeps none of 4 heads; a layer needs at least one"),
        ({"mlp": torch.ones(4, dtype=torch.bool)}, r"nor an attention .* they are \[.*'head', 'attention'\]"),
    ],
)
def test_bad_masks_are_named_and_change_nothing(keep: dict[str, Tensor], message: str) -> None:
    block = attention()
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match=message):
        slim(block, keep, inputs(block))
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())


class Reading(nn.Module):
    """Attention around which the stream is free to lose channels: nothing normalises it."""

    def __init__(self, **settings: int) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True, **settings)
        self.other, self.last = nn.Linear(5, settings.get("kdim", 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens, other = self.embed(x), self.other(x)
        out: Tensor = self.last(tokens + self.attention(tokens, other, other)[0])
        return out


@pytest.mark.parametrize(
    ("settings", "sides"),
    [({}, ["embed", "other"]), ({"kdim": 6, "vdim": 6}, ["embed"]), ({"kdim": 6, "vdim": 6}, ["other"])],
)
def test_channels_that_it_reads_and_writes_can_go_though_all_heads_stay(
    settings: dict[str, int], sides: list[str]
) -> None:
    torch.manual_seed(0)
    network, x = Reading(**settings).double(), torch.randn(4, 7, 5, dtype=torch.float64)
    projection = network.attention.out_proj
    with torch.no_grad():
        for layer in [*map(network.get_submodule, sides), *([projection] if "embed" in sides else [])]:
            layer.weight[2:5] = layer.bias[2:5] = 0  # type: ignore[index, operator]
    masked = copy.deepcopy(network)
    remove_dead_units(network, (x,))
    for side in sides:
        assert len(network.get_submodule(side).weight) == len(masked.get_submodule(side).weight) - 3  # type: ignore[arg-type]
    assert projection.weight.shape == (5 if "embed" in sides else 8, 8) and network.attention.num_heads == 2
    with torch.no_grad():
        for training in (True, False):
            assert difference([network.train(training)(x)], [masked.train(training)(x)]) < 1e-9
        assert difference([copy.deepcopy(network)(x)], [masked(x)]) < 1e-9


def test_an_encoder_with_padding_is_right_on_all_its_paths() -> None:
    """Without gradients torch would compute it with fused kernels and nested tensors, which insist on all heads."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).double()
    x, padding = torch.randn(3, 6, 16, dtype=torch.float64), torch.arange(6) >= torch.tensor([[6], [4], [3]])
    gates = find_gates(encoder, {"src": x, "src_key_padding_mask": padding})
    keep = random_keep(gates, 0)
    reference = masked(encoder, gates, keep)
    slim(encoder, keep, {"src": x, "src_key_padding_mask": padding})
    for training in (False, True):
        for network in (encoder, reference):
            for module in network.train(training).modules():
                if isinstance(module, nn.MultiheadAttention):
                    module.dropout = 0.0
                if isinstance(module, nn.Dropout):
                    module.eval()
        with torch.no_grad():
            expected, found = reference(x, src_key_padding_mask=padding), encoder(x, src_key_padding_mask=padding)
        assert difference([expected[~padding]], [found[~padding]]) < 1e-9


def test_a_transformer_with_masks_as_torch_makes_them() -> None:
    """torch looks whether masks are causal, which no capture can follow."""
    torch.manual_seed(0)
    network = nn.Transformer(16, 4, 1, 1, 24, dropout=0.0, batch_first=True).double()
    source, target = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    later = [nn.Transformer.generate_square_subsequent_mask(size, dtype=torch.float64) for size in (6, 5)]
    inputs = {"src": source, "tgt": target, "src_mask": later[0], "tgt_mask": later[1]}
    gates = find_gates(network, inputs)
    assert sum(gate.kind == "head" and gate.excluded is None for gate in gates) == 3
    keep = random_keep(gates, 0)
    reference = masked(network, gates, keep)
    assert slim(network, keep, inputs) and "forward" not in vars(network.encoder) | vars(network.decoder)
    assert difference([reference(**inputs)], [network(**inputs)]) < 1e-9


def sliding(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every query attends to three positions."""
    k, v = (nn.functional.pad(part, (0, 0, 1, 1)).unfold(2, 3, 1) for part in (k, v))
    return torch.einsum("bhiw,bhidw->bhid", torch.einsum("bhid,bhidw->bhiw", q, k).softmax(-1), v)


def retentive(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Earlier positions count, later ones do not."""
    return (q @ k.transpose(-2, -1)).tril() @ v


def cumulative(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same without scores: sums of keys times values up to each position."""
    return torch.einsum("bhid,bhide->bhie", q, torch.einsum("bhid,bhie->bhide", k, v).cumsum(2))


def latent(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All heads share some channels of the keys (DeepSeek-V2)."""
    k = torch.cat((k, x[:, None, :, :2].expand(-1, q.shape[1], -1, -1)), -1)
    return nn.functional.scaled_dot_product_attention(torch.cat((q, q[..., :2]), -1), k, v)


def shifted(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and values of other positions."""
    return nn.functional.softmax(q @ k.roll(1, 2).mT, -1) @ v.flip(2)


def relative(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of distances, looked up by numbers that are expanded for every instance and head, as DeBERTa does it."""
    place = torch.arange(x.shape[1])
    distances = (place[None, :] - place.repeat(len(place), 1).T + len(place)).clamp(0, 8)
    scores = q @ k[:, :, :1].expand(-1, -1, 9, -1).mT
    scores = scores.gather(-1, distances[None, None].expand(*q.shape[:-1], len(place)))
    return nn.functional.softmax(q @ k.mT + scores, -1) @ v


def masked_as(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask in the shape of the scores, as XLM does it."""
    scores = q @ k.mT
    mask = (x[:, :, 0] < 0).view(len(x), 1, 1, -1).expand_as(scores)
    return nn.functional.softmax(scores.masked_fill(mask, -1e9), -1) @ v


def shifting(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of distances, shifted by a column of zeros that is made for every head, as Transformer-XL does it."""
    scores = q @ torch.cat((k.flip(2), k[:, :, 1:]), 2).mT
    padded = torch.cat((torch.zeros(*scores.shape[:3], 1, dtype=x.dtype), scores), -1)
    shifted = padded.view(*scores.shape[:2], -1, scores.shape[2])[:, :, 1:].view_as(scores)
    return nn.functional.softmax(q @ k.mT + shifted[..., : k.shape[2]], -1) @ v


def dotted(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dimensions that an equation does not name."""
    return torch.einsum("...ij,...jd->...id", torch.einsum("...id, ...jd -> ...ij", q, k).softmax(-1), v)


class Written(Block):
    """Attention as a function of queries, keys and values."""

    def __init__(self, attend: Any) -> None:
        super().__init__(16, attention().attention, cross=False)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        attended = self.attend(x, q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.mlp(self.attention.projection(attended)).mean(1))


@pytest.mark.parametrize(
    "attend", [sliding, retentive, cumulative, latent, shifted, relative, masked_as, shifting, dotted]
)
def test_attention_of_other_kinds_loses_heads(attend: Any) -> None:
    block = Written(attend).double()
    (gate,) = (gate for gate in find_gates(block, inputs(block)) if gate.kind == "head")
    assert gate.excluded is None
    check(block, 0)
    inner: Any = block.attention
    assert inner.projection.in_features == inner.qkv.out_features // 3 < 16


class Biased(Block):
    """Biases of every head count where a causal mask of every instance says so, as in UMT5."""

    def __init__(self) -> None:
        super().__init__(16, attention().attention, cross=False)
        self.table = nn.Embedding(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        place = torch.arange(x.shape[1])
        mask = (place[None] <= place[:, None])[None, None].expand(len(x), 1, -1, -1)
        bias = self.table((place[:, None] - place).abs()).permute(2, 0, 1)[None]
        attended = nn.functional.scaled_dot_product_attention(q, k, v, torch.where(mask, bias, -1e9))
        return self.head(self.mlp(self.attention.projection(attended.transpose(1, 2).flatten(2))).mean(1))


def test_a_mask_of_every_instance_hides_no_bias_of_every_head() -> None:
    block = Biased().double()
    check(block, 0)
    inner: Any = block.attention
    assert block.table.weight.shape[1] == inner.projection.in_features // 4 < 4


class Windows(nn.Module):
    """Attention within windows of 2 × 2 positions, with a bias whose sizes are a tuple; as MaxViT is written."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.projection = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table, self.bias_shape = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 4)), (4, 4, 4)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def attend(self, x: Tensor) -> Tensor:
        shape = x.shape[:-1]
        qkv = self.qkv(x).view(len(x), -1, 4, 12).transpose(1, 2)
        place = torch.arange(4, dtype=x.dtype)
        between = torch.stack([place[:, None] - place, place[:, None] * place], -1).flatten(0, 1)
        bias = self.table(between).view(self.bias_shape).permute(2, 0, 1)
        values = nn.functional.scaled_dot_product_attention(*qkv.chunk(3, -1), attn_mask=bias[None])
        projected: Tensor = self.projection(values.transpose(1, 2).reshape(*shape, -1))
        return projected

    def forward(self, x: Tensor) -> Tensor:
        height, width, channels = x.shape[1:]
        y = self.norm(x).view(-1, height // 2, 2, width // 2, 2, channels).transpose(2, 3)
        y = self.attend(y.reshape(-1, 2, 2, channels))
        y = y.view(-1, height // 2, width // 2, 2, 2, channels).transpose(2, 3).reshape(-1, height, width, channels)
        logits: Tensor = self.head((x + y).mean((1, 2)))
        return logits


class Free(nn.Module):
    """Attention written into the network itself, so that no module combines the heads; two share keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.projection, self.head = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 3)

    def spread(self, part: Tensor) -> Tensor:
        return part.repeat_interleave(2, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        q, *kv = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in self.qkv(x).split([16, 8, 8], -1))
        k, v = map(self.spread, kv)
        values = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        logits: Tensor = self.head((x + self.projection(values)).mean(1))
        return logits


@pytest.mark.parametrize("alone", [False, True])
def test_heads_that_no_module_combines_are_named_by_their_projection(alone: bool, tmp_path: Path) -> None:
    """Two of them go; one whose keys and values another one needs stays, and is noted."""
    torch.manual_seed(0)
    network, x = Free().double(), torch.randn(2, 5, 16, dtype=torch.float64)
    keep = {"projection.heads": torch.tensor([True, not alone, False, False])}
    reference = masked(network, find_gates(network, x), keep)
    plan = slim(network, keep, x)
    assert network.projection.in_features == 8 and (plan.kept_for.keys() == keep.keys()) == alone
    assert difference([reference(x)], [network(x)]) < 1e-9
    save_slimmed(network, tmp_path / "slim.safetensors")
    fresh = load_slimmed(Free().double(), tmp_path / "slim.safetensors")
    assert difference([fresh(x)], [network(x)]) < 1e-12 and plan_of(fresh).kept_for == plan.kept_for


class Tiled(Free):
    """Keys and values are for every second head."""

    def spread(self, part: Tensor) -> Tensor:
        return part.repeat(1, 2, 1, 1)


def test_keys_and_values_may_be_tiled() -> None:
    torch.manual_seed(0)
    network, x = Tiled().double(), torch.randn(2, 5, 16, dtype=torch.float64)
    (heads,) = (gate for gate in find_gates(network, x) if gate.kind == "head")
    assert heads.units[:2] == heads.units[2:] and heads.units[0] != heads.units[1]
    keep = {heads.name: torch.tensor([False, True, False, True])}
    reference = masked(network, [heads], keep)
    assert not slim(network, keep, x).kept_for and network.qkv.out_features == 16
    assert difference([reference(x)], [network(x)]) < 1e-9


def test_two_calls_with_the_same_input_are_told_apart() -> None:
    torch.manual_seed(0)
    network, x = Windows().double(), torch.randn(2, 4, 4, 16, dtype=torch.float64)
    keep = {
        gate.name: torch.tensor([True, False, False, True]) for gate in find_gates(network, x) if gate.kind == "head"
    }
    assert list(keep.values())
    reference = masked(network, find_gates(network, x), keep)
    plan = slim(network, keep, x)
    assert network.qkv.out_features == 24 and network.projection.in_features == 8 and not plan.kept_for
    assert difference([reference(x)], [network(x)]) < 1e-9


def test_heads_that_are_normalised_together_stay() -> None:
    """An RMSNorm over the queries of all heads, as in OLMo 2, would miss those of a head that is not read."""

    def attend(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = norm(q.transpose(1, 2).flatten(2)).unflatten(-1, (4, -1)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, k, v)

    block = Written(attend)
    block.norm = norm = nn.RMSNorm(16)
    (gate,) = (gate for gate in find_gates(block.double(), inputs(block)) if gate.kind == "head")
    assert gate.excluded == "'norm' averages it with all other channels, and it is not zero when off"
