"""ONNX files of trained networks."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_fscreen.files import replacing
from lightning_fscreen.modules import batch_size, evaluating, with_instances


def export_onnx(
    network: nn.Module, args: tuple[Any, ...], path: str | os.PathLike[str], kwargs: Mapping[str, Any] | None = None
) -> None:
    """Write a network in eval mode, for batches of any size, to one ONNX file.

    Tested with torch 2.11 and newer; the exporter of 2.6 fails on batch norms, with an error of its own.

    Args:
        network: any network that `torch.export` can capture, slimmed or not.
        args: example inputs whose first dimension is the batch.
        path: the file; written beside and renamed.
        kwargs: likewise, those given by name.

    Raises:
        ImportError: onnx or onnxscript is missing.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"ONNX files need {package}; install it with: pip install lightning-fscreen[onnx]")
    # Two instances at least: a batch of one would be exported as such.
    device = next(network.parameters()).device
    count = max(batch_size((args, kwargs)), 2)
    args, named = with_instances((args, dict(kwargs or {})), count, device)
    batch = torch.export.Dim("batch")
    given = inspect.signature(network.forward).bind(*args, **named).arguments if named else args
    dynamic = pytree.tree_map(
        lambda leaf: {0: batch} if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == count else None, given
    )
    with replacing(path) as partial:
        with evaluating(network), torch.no_grad():
            program = torch.onnx.export(network, args, kwargs=named, dynamo=True, dynamic_shapes=dynamic, verbose=False)
        assert program is not None
        program.save(partial, external_data=False)
