"""Building blocks of random networks: (channels, rank, random) → module; each keeps the rank."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ADAPTIVE = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
ADAPTIVE_MAX = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    nn.Sigmoid,
    nn.Tanh,
    nn.GELU,
    nn.SiLU,
    nn.Softplus,
    nn.PReLU,
    lambda: nn.LeakyReLU(0.1, inplace=True),
    lambda: nn.Hardtanh(0.2, 1.0),  # f(0) != 0
    lambda: nn.Dropout(0.5),
    nn.ELU,
]


# ---- blocks: (channels, rank, random) → module; each keeps the rank and shrinks positions by 1 at most


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any], *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.parts)


def conv(c: int, rank: int, rng: random.Random) -> nn.Module:
    kernel, padding = rng.choice([(1, 0), (2, 0), (3, 1), (3, "same"), (1, 1)])
    mode = rng.choice(["zeros", "zeros", "circular", "replicate"]) if padding == 1 else "zeros"
    return CONV[rank](c, rng.choice([2, 4, 8]), kernel, padding=padding, padding_mode=mode, bias=rng.random() < 0.6)


def conv_bn_act(c: int, rank: int, rng: random.Random) -> nn.Module:
    first = conv(c, rank, rng)
    return nn.Sequential(first, NORM[rank](first.out_channels, affine=rng.random() < 0.8), rng.choice(ACTIVATIONS)())


def transposed(c: int, rank: int, rng: random.Random) -> nn.Module:
    return TRANSPOSED[rank](c, rng.choice([4, 6]), rng.choice([1, 2]), bias=rng.random() < 0.5)


def grouped(c: int, rank: int, rng: random.Random) -> nn.Module:
    return CONV[rank](c, 2 * rng.choice([1, 2, 4]), 3, padding=1, groups=2)


def depthwise(c: int, rank: int, rng: random.Random) -> nn.Module:
    padding = rng.choice([0, 1])
    first = CONV[rank](c, c, 2 + padding, padding=padding, groups=c, bias=rng.random() < 0.5)
    return nn.Sequential(first, rng.choice(ACTIVATIONS)())


def residual(c: int, rank: int, rng: random.Random) -> nn.Module:
    inner = nn.Sequential(CONV[rank](c, 4, 3, padding=1), rng.choice(ACTIVATIONS)(), CONV[rank](4, c, 1))
    return Function(lambda x, inner: x + inner(x), inner)


def inplace_residual(c: int, rank: int, rng: random.Random) -> nn.Module:
    def function(x: Tensor, inner: nn.Module) -> Tensor:
        out = inner(x)
        out += x
        return F.relu(out, inplace=True)

    return Function(function, nn.Sequential(CONV[rank](c, c, 1, bias=False), NORM[rank](c)))


def concat(c: int, rank: int, rng: random.Random) -> nn.Module:
    return Function(
        lambda x, a, b: torch.cat([a(x), x, b(x)], 1), CONV[rank](c, 2, 1), CONV[rank](c, 4, 3, padding=1, bias=False)
    )


def squeeze_excite(c: int, rank: int, rng: random.Random) -> nn.Module:
    def function(x: Tensor, down: nn.Module, up: nn.Module) -> Tensor:
        return x * up(down(x.mean(list(range(2, x.ndim)), keepdim=True)).relu()).sigmoid()

    return Function(function, CONV[rank](c, 2, 1), CONV[rank](2, c, 1))


def spatial_attention(c: int, rank: int, rng: random.Random) -> nn.Module:
    return Function(lambda x, gate: x * gate(x).sigmoid(), CONV[rank](c, 1, 1))


def pool(c: int, rank: int, rng: random.Random) -> nn.Module:
    return rng.choice(
        [
            MAX_POOL[rank](3, 1, 1),
            MAX_POOL[rank](2, 1),
            AVG_POOL[rank](3, 1, 1),
            AVG_POOL[rank](3, 1, 1, count_include_pad=False),
            AVG_POOL[rank](2, 1),
            nn.Upsample(scale_factor=2) if rank == 1 else ADAPTIVE[rank](4),
        ]
    )


def pad(c: int, rank: int, rng: random.Random) -> nn.Module:
    mode, value = rng.choice([("constant", 0.0), ("constant", 0.7), ("replicate", None), ("circular", None)])
    return Function(lambda x: F.pad(x, [1, 0] * (x.ndim - 2), mode, value))


def glu(c: int, rank: int, rng: random.Random) -> nn.Module:
    def chunked(x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return a * b.sigmoid()

    def split(x: Tensor) -> Tensor:
        a, b = x.split([c // 2, c - c // 2], 1)
        return torch.cat([b.relu(), a], 1)

    return Function(rng.choice([chunked, split]))


def shuffle(c: int, rank: int, rng: random.Random) -> nn.Module:
    def dynamic(x: Tensor) -> Tensor:
        return x.view(len(x), 2, x.shape[1] // 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape)

    def literal(x: Tensor) -> Tensor:
        return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)

    return Function(rng.choice([dynamic, literal]))


def layer_norm(c: int, rank: int, rng: random.Random) -> nn.Module:
    return Function(lambda x, norm: norm(x.movedim(1, -1)).movedim(-1, 1), nn.LayerNorm(c))


def softmax(c: int, rank: int, rng: random.Random) -> nn.Module:
    return Function(lambda x: x.softmax(1) * x)


def shared(c: int, rank: int, rng: random.Random) -> nn.Module:
    act = rng.choice(ACTIVATIONS)()
    return Function(
        lambda x, first, act: first(act(first(x))), CONV[rank](c, c, 3, padding=1, bias=rng.random() < 0.5), act
    )


def channel_scale(c: int, rank: int, rng: random.Random) -> nn.Module:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(c, *[1] * rank))
            self.register_buffer("shift", torch.randn(c, *[1] * rank))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale + self.shift

    return Scale()


def activation(c: int, rank: int, rng: random.Random) -> nn.Module:
    return rng.choice(ACTIVATIONS)()


def norm(c: int, rank: int, rng: random.Random) -> nn.Module:
    return NORM[rank](c)


BLOCKS = [
    conv,
    conv_bn_act,
    transposed,
    grouped,
    depthwise,
    residual,
    inplace_residual,
    concat,
    squeeze_excite,
    spatial_attention,
    pool,
    pad,
    glu,
    shuffle,
    layer_norm,
    softmax,
    shared,
    channel_scale,
    activation,
    norm,
]


# ---- heads: (shape of one instance, rank, random) → module; those in ANY_SIZE read any resolution


def mlp(features: int, rng: random.Random) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, 5), rng.choice(ACTIVATIONS)(), nn.Linear(5, 3, bias=rng.random() < 0.5))


def head_pool(shape: torch.Size, rank: int, rng: random.Random) -> nn.Module:
    kind = rng.choice([ADAPTIVE, ADAPTIVE_MAX])[rank]
    return nn.Sequential(kind(1), nn.Flatten(), mlp(shape[0], rng))


def head_mean(shape: torch.Size, rank: int, rng: random.Random) -> nn.Module:
    return Function(lambda x, fc: fc(x.mean(tuple(range(2, x.ndim)))), mlp(shape[0], rng))


def head_dict(shape: torch.Size, rank: int, rng: random.Random) -> nn.Module:
    def function(x: Tensor, fc: nn.Module, aux: nn.Module) -> dict[str, Any]:
        return {"logits": fc(x.flatten(2).mean(2)), "aux": (aux(x), [x.amax(1)])}

    return Function(function, mlp(shape[0], rng), CONV[rank](shape[0], 2, 1))


def head_attention(shape: torch.Size, rank: int, rng: random.Random) -> nn.Module:
    def function(x: Tensor, embed: nn.Module, attention: nn.Module, fc: nn.Module) -> Tensor:
        tokens = embed(x.flatten(2).transpose(1, 2))
        return fc((tokens + attention(tokens, tokens, tokens)[0]).mean(1))

    return Function(function, nn.Linear(shape[0], 4), nn.MultiheadAttention(4, 2, batch_first=True), mlp(4, rng))


def head_flatten(shape: torch.Size, rank: int, rng: random.Random) -> nn.Module:
    return nn.Sequential(nn.Flatten(), mlp(shape.numel(), rng))


def head_view(shape: torch.Size, rank: int, rng: random.Random) -> nn.Module:
    return Function(lambda x, fc: fc(x.contiguous().view(x.size(0), -1)), mlp(shape.numel(), rng))


def head_literal(shape: torch.Size, rank: int, rng: random.Random) -> nn.Module:
    size = shape.numel()
    return Function(lambda x, fc: fc(x.reshape(-1, size)), mlp(size, rng))


ANY_SIZE = [head_pool, head_mean, head_dict, head_attention]
HEADS = [*ANY_SIZE, head_flatten, head_view, head_literal]


# ---- blocks around batch norms, for channels that are switched off


def conv_norm(c: int, rank: int, rng: random.Random) -> nn.Module:
    first = conv(c, rank, rng)
    return nn.Sequential(first, NORM[rank](first.out_channels), rng.choice(ACTIVATIONS)())


def norm_conv(c: int, rank: int, rng: random.Random) -> nn.Module:
    return nn.Sequential(NORM[rank](c), rng.choice(ACTIVATIONS)(), conv(c, rank, rng))


def post_activation(c: int, rank: int, rng: random.Random) -> nn.Module:
    """Residual block whose batch norms put out what is added."""
    inner = nn.Sequential(CONV[rank](c, 6, 3, padding=1, bias=False), NORM[rank](6), nn.ReLU())
    outer = nn.Sequential(CONV[rank](6, c, 1, bias=False), NORM[rank](c))
    skip = nn.Sequential(CONV[rank](c, c, 1), NORM[rank](c)) if rng.random() < 0.5 else nn.Identity()
    return Function(lambda x, inner, outer, skip: (outer(inner(x)) + skip(x)).relu(), inner, outer, skip)


def pre_activation(c: int, rank: int, rng: random.Random) -> nn.Module:
    """Residual block whose batch norms read the stream."""
    act = rng.choice(ACTIVATIONS)
    first = nn.Sequential(NORM[rank](c), act(), CONV[rank](c, 5, 3, padding=1, bias=rng.random() < 0.3))
    second = nn.Sequential(NORM[rank](5), act(), CONV[rank](5, c, 1, bias=False))
    return Function(lambda x, first, second: x + second(first(x)), first, second)


def dense(c: int, rank: int, rng: random.Random) -> nn.Module:
    layers = [
        nn.Sequential(NORM[rank](c + 3 * i), nn.ReLU(), CONV[rank](c + 3 * i, 3, 3, padding=1, bias=False))
        for i in range(2)
    ]

    def function(x: Tensor, *layers: nn.Module) -> Tensor:
        for layer in layers:
            x = torch.cat([x, layer(x)], 1)
        return x

    return Function(function, *layers)


def inverted(c: int, rank: int, rng: random.Random) -> nn.Module:
    """Expansion, depthwise convolution, perhaps squeeze and excitation, projection."""
    wide, spread = 6, rng.choice([1, 1, 2])
    expand = nn.Sequential(CONV[rank](c, wide, 1, bias=False), NORM[rank](wide), rng.choice([nn.ReLU6, nn.Hardswish])())
    depth = nn.Sequential(
        CONV[rank](wide, wide * spread, 3, padding=1, groups=wide, bias=rng.random() < 0.3),
        NORM[rank](wide * spread),
        rng.choice([nn.SiLU, nn.ReLU])(),
    )
    down, up = CONV[rank](wide * spread, 2, 1), CONV[rank](2, wide * spread, 1)
    gate = rng.choice([nn.Sigmoid, nn.Hardsigmoid])() if rng.random() < 0.6 else None
    project = nn.Sequential(CONV[rank](wide * spread, c, 1, bias=False), NORM[rank](c))

    def function(x: Tensor, expand: nn.Module, depth: nn.Module, project: nn.Module, *rest: nn.Module) -> Tensor:
        inner = depth(expand(x))
        if rest:
            down, up, gate = rest
            inner = gate(up(down(inner.mean(list(range(2, x.ndim)), keepdim=True)).relu())) * inner
        return x + project(inner)

    return Function(function, expand, depth, project, *([] if gate is None else [down, up, gate]))


def grouped_norm(c: int, rank: int, rng: random.Random) -> nn.Module:
    groups = rng.choice([2, 4])
    make = rng.choice([CONV, TRANSPOSED])[rank]
    first = nn.Sequential(CONV[rank](c, 8, 1), NORM[rank](8), nn.ReLU())
    middle = make(8, 8, 3, padding=1, groups=groups, bias=rng.random() < 0.5)
    return nn.Sequential(first, middle, NORM[rank](8), nn.ReLU(inplace=True))


def shuffle_unit(c: int, rank: int, rng: random.Random) -> nn.Module:
    """ShuffleNet's: half of the channels pass, the other half is transformed, and both are shuffled."""
    half = c // 2
    branch = nn.Sequential(
        CONV[rank](half, half, 1, bias=False),
        NORM[rank](half),
        nn.ReLU(),
        CONV[rank](half, half, 3, padding=1, groups=half, bias=False),
        NORM[rank](half),
        CONV[rank](half, half, 1, bias=False),
        NORM[rank](half),
        nn.ReLU(),
    )
    sliced = rng.random() < 0.3

    def function(x: Tensor, branch: nn.Module) -> Tensor:
        middle = x.shape[1] // 2
        first, second = (x[:, :middle], x[:, middle:]) if sliced else x.chunk(2, 1)
        joined = torch.cat([first, branch(second)], 1)
        return joined.view(len(x), 2, middle, *x.shape[2:]).transpose(1, 2).reshape(joined.shape)

    return Function(function, branch)


def norm_twice(c: int, rank: int, rng: random.Random) -> nn.Module:
    """One batch norm for two streams."""
    return Function(
        lambda x, norm, first, second: first(norm(x).relu()) + second(norm(x * 2).relu()),
        NORM[rank](c),
        CONV[rank](c, 4, 1),
        CONV[rank](c, 4, 3, padding=1),
    )


class Auxiliary(nn.Module):
    """Adds what a head put out to the outputs, in train mode only."""

    def __init__(self, body: nn.Module, channels: int, rank: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Sequential(CONV[rank](channels, 4, 1), NORM[rank](4), nn.ReLU(), ADAPTIVE[rank](1), nn.Flatten())
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        out = self.body(x)
        return {"out": out, "aux": self.fc(self.head(x))} if self.training else {"out": out}


def noise(c: int, rank: int, rng: random.Random) -> nn.Module:
    """Stochastic depth."""

    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return x
            return x * torch.empty([len(x)] + [1] * rank + [1], dtype=x.dtype).bernoulli_(0.8)

    return Function(lambda x, noise, inner: x + noise(inner(x)), Noise(), pre_activation(c, rank, rng))


def linear_norm(shape: torch.Size, rank: int, rng: random.Random) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(shape.numel(), 6, bias=rng.random() < 0.5),
        nn.BatchNorm1d(6),
        rng.choice(ACTIVATIONS)(),
        nn.Linear(6, 3),
    )


NORM_BLOCKS = [
    conv_norm,
    norm_conv,
    post_activation,
    pre_activation,
    dense,
    inverted,
    grouped_norm,
    shuffle_unit,
    norm_twice,
    noise,
    norm,
]
