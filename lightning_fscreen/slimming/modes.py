"""Whether a network computes the same in train and in eval mode: it does if its forward never asks in which it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules import dropout

# They ask, but do the same in both modes, if nothing is dropped.
_SAME_IN_BOTH = (
    *(getattr(dropout, name) for name in dropout.__all__),
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerEncoder,
)
_FORWARDS = {kind.forward for kind in _SAME_IN_BOTH}


@contextlib.contextmanager
def without_mode(network: nn.Module) -> Iterator[None]:
    """Modules have no attribute `training` inside, except those that do the same in both modes without dropout.

    A forward that runs like this computes the same in both.

    Raises:
        AttributeError: of the forward, if it asks; at once, if a module does something of its own when modes change, or
            keeps its mode elsewhere.
    """
    modules = list(network.modules())
    for module in modules:
        if type(module).train is not nn.Module.train or "training" not in vars(module):
            raise AttributeError(f"{type(module).__name__} may differ in train and eval mode")
    modes = [(module, module.training) for module in modules if type(module).forward not in _FORWARDS]
    for module, _ in modes:
        del module.training
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
