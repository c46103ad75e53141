"""Tensors that are mostly zeros, as a bit mask and the values that are left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_fscreen.slimming.plan import PlanError

MASKS = "#masks"
"""Name of the tensor that holds the masks: one bit for each element, those of every tensor from a new byte on."""
_WORTH = 256
"""Bytes that packing has to save: more than it takes in the file's header."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Pack the tensors that take less room so.

    Args:
        tensors: on the CPU, contiguous.

    Returns:
        What is to be stored, and the shapes of the packed ones, in the order of their masks. A packed tensor is stored
        as the vector of its values that are not zero, to the bit: a negative zero is none.
    """
    stored, shapes, masks = dict(tensors), dict[str, list[int]](), []
    if MASKS in tensors:
        return stored, shapes
    for name in sorted(tensors):
        tensor = tensors[name]
        size = tensor.element_size()
        if size not in _BITS or not tensor.is_floating_point() or tensor.nbytes - tensor.numel() / 8 < _WORTH:
            continue
        flat = tensor.reshape(-1)
        bits = flat.view(_BITS[size])
        left = bits != 0
        if tensor.nbytes - tensor.numel() / 8 - size * int(left.sum()) >= _WORTH:
            stored[name], shapes[name] = bits[left].view(tensor.dtype), list(tensor.shape)
            masks.append(torch.from_numpy(np.packbits(left.numpy())))
    if masks:
        stored[MASKS] = torch.cat(masks)
    return stored, shapes


def unpack(stored: Mapping[str, Tensor], shapes: Any) -> dict[str, Tensor]:
    """The tensors that `pack` got.

    Args:
        stored: tensors of a file.
        shapes: as the file has them, whatever it is.

    Raises:
        PlanError: masks, values and shapes do not fit. Until then nothing has been made that is larger than the file
            by more than a factor of 64, one value of eight bytes for every bit.
    """
    if not isinstance(shapes, Mapping) or not all(map(_is_shape, shapes.values())):
        raise PlanError(f"the file says that tensors are packed, but not of which shapes: {str(shapes)[:100]}")
    tensors = dict(stored)
    if not shapes:
        return tensors
    masks = tensors.pop(MASKS, torch.empty(0, dtype=torch.uint8))
    lengths = [-(-math.prod(shape) // 8) for shape in shapes.values()]
    if masks.dtype != torch.uint8 or masks.ndim != 1 or len(masks) != sum(lengths):
        raise PlanError(f"the masks of the packed tensors take {sum(lengths)} bytes, the file has {masks.numel()}")
    for (name, shape), mask in zip(shapes.items(), masks.split(lengths), strict=True):
        values = tensors.get(name)
        left = torch.from_numpy(np.unpackbits(mask.numpy(), count=math.prod(shape))).bool()
        if values is None or values.ndim != 1 or int(left.sum()) != len(values) or values.element_size() not in _BITS:
            found = "none" if values is None else tuple(values.shape)
            raise PlanError(
                f"the packed tensor {name!r} has {int(left.sum())} values by its mask, the file has {found}"
            )
        bits = _BITS[values.element_size()]
        flat = torch.zeros(len(left), dtype=bits)
        flat[left] = values.view(bits)
        tensors[name] = flat.view(values.dtype).reshape(shape)
    return tensors


def _is_shape(value: Any) -> bool:
    return isinstance(value, Sequence) and all(type(size) is int and size > 0 for size in value)
