"""ONNX files of trained networks."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import nn

from lightning_fscreen.modules import evaluating
from lightning_fscreen.saving.files import replacing


def export_onnx(network: nn.Module, args: tuple[Any, ...], path: str | os.PathLike[str]) -> None:
    """Write a network in eval mode, for batches of any size, to one ONNX file.

    Tested with torch 2.11 and newer; the exporter of 2.6 fails on batch norms, with an error of its own.

    Args:
        network: any network that `torch.export` can capture, slimmed or not.
        args: example inputs whose first dimension is the batch.
        path: the file; written beside and renamed.

    Raises:
        ImportError: onnx or onnxscript is missing.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"ONNX files need {package}; install it with: pip install lightning-fscreen[onnx]")
    batch = torch.export.Dim("batch")
    with replacing(path) as partial:
        with evaluating(network), torch.no_grad():
            program = torch.onnx.export(
                network, args, dynamo=True, dynamic_shapes=tuple({0: batch} for _ in args), verbose=False
            )
        assert program is not None
        program.save(partial, external_data=False)
