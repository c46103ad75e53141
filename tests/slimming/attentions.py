"""Attention in the ways in which people write it, and the masked network: zeros in the columns that read a head."""

from __future__ import annotations

import contextlib
import copy
import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_fscreen.slimming import Gate

PRODUCTS = ("matmul", "einsum", "fused", "bmm", "baddbmm", "autocast", "linear")
SIZES = ("of the stream", "attributes", "inferred")
EXTRAS = {
    "": "",
    "norm": "a LayerNorm of queries and keys",
    "rms": "an RMSNorm of queries and keys",
    "scale": "a scale for every head",
    "table": "biases for every head, looked up by distances",
    "bias": "biases for every head, in a parameter with positions",
    "slopes": "the same in a buffer",
    "rotation": "rotary positions",
    "complex": "the same with complex numbers",
    "shared": "a linear layer that all heads share",
    "pooled": "a convolution over the keys, with heads in its batch",
    "registers": "keys and values of each head that are learned",
    "places": "products of the queries and learned vectors, for every head or for all",
}


class Attention(nn.Module):
    """Queries, keys and values from one layer or from three, for self- or cross-attention.

    Args:
        width: of the stream.
        heads: of the queries.
        size: of a head.
        groups: heads of keys and values.
        product: how attention is computed, one of `PRODUCTS`.
        sizes: where forward takes the number and the size of heads from, one of `SIZES`.
        fused: one layer for all three.
        bias: whether layers have one.
        extra: one of `EXTRAS`.
        causal: whether later positions are masked.
        turns: whether the projection reads a channel of each head, the next channel of each, and so on.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        size: int,
        groups: int,
        product: str,
        sizes: str,
        fused: bool,
        bias: bool,
        extra: str,
        causal: bool,
        turns: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.num_groups, self.all_heads = heads, size, groups, heads * size
        self.product, self.sizes, self.extra, self.causal, self.turns = product, sizes, extra, causal, turns
        self.fused, self.parts = fused, [heads * size, groups * size, groups * size]
        if fused:
            self.qkv = nn.Linear(width, sum(self.parts), bias=bias)
        else:
            self.query = nn.Linear(width, heads * size, bias=bias)
            self.key, self.value = (nn.Linear(width, groups * size, bias=bias) for _ in range(2))
        if extra in ("norm", "rms"):
            self.norm = nn.LayerNorm(size) if extra == "norm" else nn.RMSNorm(size)
        if extra == "shared":
            self.mix = nn.Linear(size, size)
        if extra == "pooled":
            self.pool = nn.Conv1d(size, size, 3, padding=1, groups=size)
        if extra == "places":
            self.places = nn.Parameter(torch.randn(heads, size, 9) if bias else torch.randn(9, size))
        if extra == "registers":
            self.keys, self.values = (nn.Parameter(torch.randn(groups, 2, size)) for _ in range(2))
        if extra == "bias":
            self.biases = nn.Parameter(torch.randn(1, heads, 9, 9))
        if extra == "slopes":
            self.register_buffer("biases", torch.randn(heads, 1, 9))
        if extra == "complex":
            self.register_buffer("angles", torch.polar(torch.ones(9, size // 2), torch.randn(9, size // 2)))
        if extra == "scale":
            self.scale = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)
        if extra == "table":
            self.table = nn.Parameter(torch.randn(9, heads))
        self.projection = nn.Linear(heads * size, width, bias=bias)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        count, length, width = x.shape
        if self.sizes == "of the stream":  # right as long as no head is gone
            size, total = width // self.num_heads, width
        else:
            size, total = self.head_dim, self.all_heads if self.sizes == "attributes" else -1
        if self.fused and self.num_groups < self.num_heads:
            of_memory = self.qkv(x if memory is None else memory).split(self.parts, -1)[1:]
            parts = zip((self.qkv(x).split(self.parts, -1)[0], *of_memory), self._heads(), strict=True)
            q, k, v = (self._taken_apart(part, size, heads) for part, heads in parts)
        elif self.fused and memory is None:
            shape = (count, length, 3, self.num_heads, size)
            q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.fused:
            q, k, v = (
                part.reshape(count, part.shape[1], -1, size).transpose(1, 2)
                for part in (
                    self.qkv(x).chunk(3, -1)[0],
                    *self.qkv(memory).chunk(3, -1)[1:],
                )
            )
        else:
            memory = x if memory is None else memory
            parts = zip((self.query(x), self.key(memory), self.value(memory)), self._heads(), strict=True)
            q, k, v = (self._taken_apart(part, size, heads) for part, heads in parts)
        q, k, v = self._with_extra(q, k, v)
        joined = self._attended(q, k, v, size)
        joined = joined.permute(0, 2, 3, 1) if self.turns else joined.transpose(1, 2)
        return self.projection(joined.reshape(count, length, total))

    def _with_extra(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.extra in ("norm", "rms"):
            return self.norm(q), self.norm(k), v
        if self.extra == "rotation":
            return rotated(q), rotated(k), v
        if self.extra == "complex":
            q, k = (
                torch.view_as_real(
                    torch.view_as_complex(part.reshape(*part.shape[:-1], -1, 2)) * self.angles[: part.shape[2]]
                ).flatten(3)
                for part in (q, k)
            )
        if self.extra == "shared":
            k = self.mix(k)
        if self.extra == "pooled":
            k = self.pool(k.flatten(0, 1).transpose(1, 2)).transpose(1, 2).unflatten(0, (len(k), -1))
        if self.extra == "registers":
            k, v = (
                torch.cat((learned[None].expand(len(q), -1, -1, -1), part), 2)
                for learned, part in ((self.keys, k), (self.values, v))
            )
        return q, k, v

    def _heads(self) -> tuple[int, int, int]:
        return self.num_heads, self.num_groups, self.num_groups

    def _taken_apart(self, x: Tensor, size: int, heads: int) -> Tensor:
        if self.sizes == "attributes":
            return x.view(*x.shape[:-1], heads, size).transpose(1, 2)
        return x.unflatten(-1, (-1, size)).transpose(1, 2)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
        if 1 < k.shape[1] < q.shape[1] and self.product != "fused":
            repeats = self.num_heads // self.num_groups
            if self.product == "matmul":
                k, v = (part.repeat_interleave(repeats, 1) for part in (k, v))
            else:
                k, v = (
                    part[:, :, None].expand(-1, -1, repeats, -1, -1).reshape(len(part), -1, *part.shape[2:])
                    for part in (k, v)
                )
        if self.extra == "scale":
            q = q * self.scale
        bias = None
        if self.extra == "table":
            places = (torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])).clamp(-4, 4) + 4
            bias = self.table[places.flatten()].view(*places.shape, -1).permute(2, 0, 1).unsqueeze(0)
        if self.extra == "places" and self.places.dim() == 3:
            bias = q @ self.places[..., : k.shape[2]]
        if self.extra == "places" and self.places.dim() == 2:
            bias = torch.einsum("bhid,jd->bhij", q, self.places[: k.shape[2]])
        if self.extra in ("bias", "slopes"):
            bias = self.biases[..., : q.shape[2], : k.shape[2]]
        if self.causal:
            later = torch.full((q.shape[2], k.shape[2]), -1e9, dtype=q.dtype).triu(1)
            bias = later if bias is None else bias + later
        if self.product == "fused":
            grouped = k.shape[1] < q.shape[1]
            return functional.scaled_dot_product_attention(q, k, v, bias, enable_gqa=grouped)
        one = k.shape[1] < q.shape[1]  # all queries share keys and values
        if self.product == "einsum":
            k, v, keys = (k[:, 0], v[:, 0], "bjd") if one else (k, v, "bhjd")
            scores = torch.einsum(f"bhid,{keys}->bhij", q, k) * size**-0.5
            weights = (scores if bias is None else scores + bias).softmax(-1)
            return torch.einsum(f"bhij,{keys}->bhid", weights, v)
        if self.product in ("bmm", "baddbmm") and bias is None and not one:
            heads = q.shape[1]
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))
            if self.product == "bmm":
                scores = torch.bmm(q, k.transpose(1, 2)).mul(size**-0.5)
            else:
                nothing = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
                scores = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=size**-0.5)
            return torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, heads))
        if self.product == "linear" and bias is None:
            q, k = functional.elu(q) + 1, functional.elu(k) + 1
            return q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(2, keepdim=True).transpose(-2, -1) + 1e-6)
        with torch.autocast("cpu", enabled=False) if self.product == "autocast" else contextlib.nullcontext():
            scores = q @ k.transpose(-2, -1) * size**-0.5
            return (scores if bias is None else scores + bias).softmax(-1) @ v


def rotated(x: Tensor) -> Tensor:
    """Rotary positions."""
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.ones(x.shape[-1], dtype=x.dtype) * 0.1
    half = x.shape[-1] // 2
    return x * angles.cos() + torch.cat((-x[..., half:], x[..., :half]), -1) * angles.sin()


class Block(nn.Module):
    """Attention and hidden units around a stream; the memory, if any, is another part of the input."""

    def __init__(self, width: int, attention: nn.Module, cross: bool) -> None:
        super().__init__()
        self.attention, self.cross = attention, cross
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 10), nn.GELU(), nn.Linear(10, width))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.before(x)
        x = x + (self.attention(normed, normed[:, :3]) if self.cross else self.attention(normed))
        return self.head((x + self.mlp(self.after(x))).mean(1))


class Torch(nn.Module):
    """`nn.MultiheadAttention` in all its settings."""

    def __init__(self, width: int, heads: int, **settings: Any) -> None:
        super().__init__()
        self.weights = settings.pop("weights")
        self.attention = nn.MultiheadAttention(width, heads, **settings)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        if not self.attention.batch_first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        out: Tensor = self.attention(x, memory, memory, need_weights=self.weights)[0]
        return out if self.attention.batch_first else out.transpose(0, 1)


def random_block(seed: int) -> Block:
    """A block with any attention, in float64."""
    rng = random.Random(seed)
    heads, size, cross = rng.choice([2, 3, 4, 6]), rng.choice([2, 4]), rng.random() < 0.3
    attention: nn.Module
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if rng.random() < 0.2:
            other = {"kdim": heads * size, "vdim": heads * size} if rng.random() < 0.3 else {}
            flags = {key: rng.random() < 0.5 for key in ("bias", "batch_first", "weights")}
            attention = Torch(heads * size, heads, **flags, **other)
            width = heads * size
        else:
            sizes = rng.choice(SIZES)
            width = heads * size if sizes == "of the stream" else rng.choice([heads * size, 10])
            groups = rng.choice([count for count in (heads, heads, heads // 2, 1) if heads % count == 0])
            groups = heads if sizes == "of the stream" else groups
            attention = Attention(
                *(width, heads, size, groups, rng.choice(PRODUCTS), sizes),
                fused=rng.random() < 0.5,
                bias=rng.random() < 0.7,
                extra=rng.choice(list(EXTRAS)),
                causal=rng.random() < 0.3 and not cross,
                turns=rng.random() < 0.2,
            )
        return Block(width, attention, cross).double()


def masked(network: nn.Module, gates: list[Gate], keep: dict[str, Tensor]) -> Any:
    """The network with zeros in it."""
    network = copy.deepcopy(network)
    with torch.no_grad():
        for gate in gates:
            if gate.name not in keep:
                continue
            module: Any = network.get_submodule(gate.projection or gate.name)
            if gate.kind == "head":
                columns = (~keep[gate.name]).repeat_interleave(module.weight.shape[1] // gate.channels)
                module.weight[:, columns] = 0
                continue
            module.weight[~keep[gate.name]] = 0
            if module.bias is not None:
                module.bias[~keep[gate.name]] = 0
    return network


def random_keep(gates: list[Gate], seed: int) -> dict[str, Tensor]:
    """Masks of about half of the units, those that share their fate alike, at least one of each layer."""
    rng = random.Random(seed)
    fate = {unit: rng.random() < 0.5 for gate in gates for unit in gate.units}
    for gate in gates:
        if gate.excluded is None and not any(fate[unit] for unit in gate.units):
            fate[rng.choice([unit for unit in gate.units if unit >= 0])] = True
    free = [gate for gate in gates if gate.excluded is None]
    return {gate.name: torch.tensor([unit < 0 or fate[unit] for unit in gate.units]) for gate in free}
