"""A trained network with the inputs that it gets: those of a batch, or given ones, cut to a few instances."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from lightning_fscreen.fit.networks import Network
from lightning_fscreen.fit.settings import Settings
from lightning_fscreen.modules import evaluating
from lightning_fscreen.slimming.gates import call_arguments
from lightning_fscreen.statistics.one_pass import Forward, call, device_of, labels_of


def with_inputs(model: nn.Module, example_inputs: Any) -> Network:
    """The model with these inputs of its forward: a tensor, a tuple of arguments or a dict of keyword arguments."""
    network = Network("", model)
    network.record_few(model, *call_arguments(example_inputs))
    return network


def of_batch(model: nn.Module, batch: Any, settings: Settings, forward: Forward | None) -> Network:
    """The model with the inputs that it gets from a batch.

    Raises:
        ValueError: `forward` does not call the model.
    """
    network = Network("", model)

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if network.inputs is None:
            network.record_few(model, args, kwargs)

    batch = move_data_to_device(batch, device_of(model))
    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with evaluating(model), torch.no_grad():
            call(model, batch, labels_of(batch, settings.labels, settings.needs_activations), forward)
    finally:
        handle.remove()
    if network.inputs is None:
        raise ValueError(f"forward= does not call the {type(model).__name__} that is to be pruned")
    return network
