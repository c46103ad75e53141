"""Small transformers: of the patches of an image, and of the words of a text.

Blocks of pre-norm self-attention and a feed-forward part with GELU (Dosovitskiy et al., "An Image Is Worth 16x16
Words", ICLR 2021, arXiv 2010.11929); the mean over the tokens is classified. Their units are the heads and the hidden
units of the feed-forward parts; LayerNorms read the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fscreen.models.common import check_sizes

_STD = 0.02  # of weights at the start
_WORD_STD = 0.2  # of words and their positions, which nothing but the embedding tells apart


class Attention(nn.Module):
    """Self-attention.

    Args:
        width: channels of a token.
        heads: number of heads, which divides the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) → the same shape."""
        query, key, value = (each.unflatten(-1, (-1, self.size)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        heads = F.scaled_dot_product_attention(query, key, value)
        result: Tensor = self.project(heads.transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    """Attention, then ``width → hidden → width`` for every token, each added to its input.

    Args:
        width: channels of a token.
        heads: number of heads.
        hidden: hidden units of the feed-forward part.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.expand, self.project = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) → the same shape."""
        x = x + self.attention(self.norm1(x))
        change: Tensor = self.project(F.gelu(self.expand(self.norm2(x))))
        return x + change


class Encoder(nn.Module):
    """Positions are added to the tokens, blocks transform them, their mean gives the logits.

    Args:
        num_classes: number of logits C.
        length: number of tokens T.
        width: channels of a token.
        depth: number of blocks.
        heads: number of heads of every block, which divides the width.
        hidden: hidden units of every block.

    Raises:
        ValueError: a size below 1, or heads that do not divide the width.
    """

    def __init__(self, num_classes: int, length: int, width: int, depth: int, heads: int, hidden: int) -> None:
        super().__init__()
        if min(length, width, depth, heads, hidden) < 1 or width % heads:
            raise ValueError(
                "all sizes must be at least 1 and heads must divide width, got "
                f"length {length}, width {width}, depth {depth}, heads {heads} and hidden {hidden}"
            )
        self.positions = nn.Parameter(torch.empty(1, length, width))
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (N, T, width) to logits (N, C)."""
        logits: Tensor = self.head(self.norm(self.blocks(tokens + self.positions)).mean(1))
        return logits


class ViT(nn.Module):
    """A vision transformer; see :func:`vit`."""

    def __init__(
        self, num_classes: int, in_channels: int, size: int, patch: int, width: int, depth: int, heads: int, hidden: int
    ) -> None:
        super().__init__()
        check_sizes(num_classes, in_channels)
        if patch < 1 or size % patch:
            raise ValueError(f"patch must divide size, got {patch} and {size}")
        self.embed = nn.Conv2d(in_channels, width, patch, patch)
        self.encoder = Encoder(num_classes, (size // patch) ** 2, width, depth, heads, hidden)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, size, size) to logits (N, C)."""
        logits: Tensor = self.encoder(self.embed(x).flatten(2).transpose(1, 2))
        return logits


class TextTransformer(nn.Module):
    """A transformer of words; see :func:`text_transformer`."""

    def __init__(
        self, num_classes: int, words: int, length: int, width: int, depth: int, heads: int, hidden: int
    ) -> None:
        super().__init__()
        if min(num_classes, words) < 1:
            raise ValueError(f"num_classes and words must be at least 1, got {num_classes} and {words}")
        self.embed = nn.Embedding(words, width)
        self.encoder = Encoder(num_classes, length, width, depth, heads, hidden)
        _initialize(self)
        for parameter in (self.embed.weight, self.encoder.positions):
            nn.init.trunc_normal_(parameter, std=_WORD_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Map the indices of words (N, length) to logits (N, C)."""
        logits: Tensor = self.encoder(self.embed(x))
        return logits


def _initialize(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.trunc_normal_(parameter, std=_STD)
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)


def vit(
    num_classes: int = 10,
    in_channels: int = 3,
    size: int = 32,
    patch: int = 4,
    width: int = 96,
    depth: int = 4,
    heads: int = 6,
    hidden: int = 384,
) -> ViT:
    """Build a small vision transformer, with 459,370 parameters by default.

    Args:
        num_classes: number of logits C.
        in_channels: channels of the images.
        size: height and width of the images.
        patch: a token is a square of so many by so many pixels.
        width: channels of a token.
        depth: number of blocks.
        heads: number of heads of every block, which divides the width.
        hidden: hidden units of every block.

    Returns:
        The network, with weights of standard deviation 0.02.
    """
    return ViT(num_classes, in_channels, size, patch, width, depth, heads, hidden)


def text_transformer(
    num_classes: int = 4,
    words: int = 100,
    length: int = 16,
    width: int = 64,
    depth: int = 2,
    heads: int = 8,
    hidden: int = 256,
) -> TextTransformer:
    """Build a small transformer of words, with 107,780 parameters by default.

    Args:
        num_classes: number of logits C.
        words: size of the vocabulary.
        length: words of a text.
        width: channels of a token.
        depth: number of blocks.
        heads: number of heads of every block, which divides the width.
        hidden: hidden units of every block.

    Returns:
        The network, with weights of standard deviation 0.02 and words of 0.2.
    """
    return TextTransformer(num_classes, words, length, width, depth, heads, hidden)
