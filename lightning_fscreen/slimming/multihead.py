"""`nn.MultiheadAttention` with as many heads as its weights have; torch's own forward insists on all of them."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Undo = Callable[[], None]


class Multihead:
    """What `forward` of an `nn.MultiheadAttention` computes, by the sizes of its weights.

    It stands in the module's place for `forward`, so that the module stays of its class, with its parameters and their
    names, and can be copied, pickled, compiled and exported.

    Args:
        module: the attention.
    """

    def __init__(self, module: nn.MultiheadAttention) -> None:
        self._module = module

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the method."""
        return inspect.signature(nn.MultiheadAttention.forward.__get__(self._module))

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`; masks say all, so that `is_causal` is a hint that is not needed.

        Raises:
            RuntimeError: `is_causal` without a mask, as torch does.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        module, batched = self._module, query.dim() == 3
        same = query is key and key is value
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not module.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        mask = _joined(attn_mask, key_padding_mask, query)
        q, k, v = (
            part.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
            for part in self._projected(query, key, value, same)
        )
        dropout = module.dropout if module.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * module.head_dim**-0.5
            weights = F.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, dropout) if dropout else weights
            joined = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            joined = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = F.linear(joined.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if module.batch_first else output.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, same: bool) -> tuple[Tensor, ...]:
        """Queries, keys and values of all heads."""
        module = self._module
        weight: Tensor | None = module.in_proj_weight
        bias: Tensor | None = module.in_proj_bias
        if weight is not None and same:
            return F.linear(query, weight, bias).chunk(3, -1)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        if weight is not None:
            weights = weight.chunk(3)
        else:
            weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        return tuple(map(F.linear, (query, key, value), weights, biases))


def _joined(mask: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
    """One mask to add to the scores, broadcastable to (N, heads, L, S), from (L, S) or (N·heads, L, S) and (N, S)."""

    def added(given: Tensor) -> Tensor:
        if given.dtype != torch.bool:
            return given.to(like.dtype)
        return torch.zeros_like(given, dtype=like.dtype).masked_fill(given, -torch.inf)

    if mask is not None:
        mask = added(mask)
        mask = mask.unflatten(0, (len(like), -1)) if mask.dim() == 3 else mask
    if padding is None:
        return mask
    padding = added(padding)[:, None, None]
    return padding if mask is None else mask + padding


def is_plain(module: nn.Module) -> bool:
    """Whether `Multihead` computes what a module's own forward does."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and module.bias_k is None
        and not module.add_zero_attn
    )


@contextlib.contextmanager
def by_sizes(network: nn.Module) -> Iterator[None]:
    """All attention of a network computes by the sizes of its weights inside."""
    modules = [module for module in network.modules() if is_plain(module) and "forward" not in vars(module)]
    for module in modules:
        module.forward = Multihead(module)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for module in modules:
            del module.forward


@contextlib.contextmanager
def without_hints(network: nn.Module) -> Iterator[None]:
    """Encoders and decoders of torch take masks as they are inside.

    Else they look whether a mask is causal, which `torch.export` cannot follow, for a hint that changes no result.
    """
    hints = {nn.TransformerEncoder.forward: "is_causal", nn.TransformerDecoder.forward: "tgt_is_causal"}
    modules = [part for part in network.modules() if type(part).forward in hints and "forward" not in vars(part)]

    def plain(forward: Callable[..., Tensor], hint: str) -> Callable[..., Tensor]:
        signature = inspect.signature(forward)

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Tensor:
            given = signature.bind(*args, **kwargs).arguments
            return forward(**{**given, hint: given.get(hint) or False})

        return run

    for module in modules:
        module.forward = plain(module.forward, hints[type(module).forward])
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def match_heads(module: nn.Module) -> list[Undo]:
    """Let an attention compute by the sizes of its weights if it has lost heads, or channels that it reads or writes.

    One that has all of them computes as torch does. torch's fused path, which would not, is closed for it, and nested
    tensors for the encoder around it.
    """
    if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False):
        inside = (part for part in module.modules() if isinstance(part, nn.MultiheadAttention))
        return [_set(module, "use_nested_tensor", False)] if any(map(_is_smaller, inside)) else []
    if not isinstance(module, nn.MultiheadAttention) or not is_plain(module):
        return []
    own = isinstance(vars(module).get("forward"), Multihead)
    undo = []
    if _is_smaller(module) != own:
        undo.append(_set(module, "forward", None if own else Multihead(module)))
        undo.append(_set(module, "_qkv_same_embed_dim", own and module.in_proj_weight is not None))
    heads = module.out_proj.weight.shape[1] // module.head_dim
    return [*undo, _set(module, "num_heads", heads)] if heads != module.num_heads else undo


def _is_smaller(module: nn.MultiheadAttention) -> bool:
    projections: list[tuple[Tensor | None, int]] = [
        *[(module.in_proj_weight, module.embed_dim), (module.q_proj_weight, module.embed_dim)],
        *[(module.k_proj_weight, module.kdim), (module.v_proj_weight, module.vdim)],
    ]
    inputs = any(weight is not None and weight.shape[1] < size for weight, size in projections)
    return inputs or min(module.out_proj.weight.shape) < module.embed_dim


def _set(module: nn.Module, name: str, value: object) -> Undo:
    """Set an attribute, or remove it for None; returns what undoes it."""
    values = vars(module)
    there, old = name in values, values.get(name)
    if value is None:
        del values[name]
    else:
        values[name] = value

    def undo() -> None:
        if there:
            values[name] = old
        else:
            values.pop(name, None)

    return undo
