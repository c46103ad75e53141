"""A batch norm that reads some channels of a stream: the channels are selected in front of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SELECT = "selected_channels"
"""Name of the buffer with the indices; not in the state_dict, since the plan holds them."""


def select_channels(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """Forward pre-hook of a batch norm: (N, channels of the stream, …) → (N, its own channels, …)."""
    indices = module.get_buffer(SELECT)
    if args:
        args = (args[0].index_select(1, indices), *args[1:])
    elif kwargs:
        kwargs = {**kwargs, "input": kwargs["input"].index_select(1, indices)}
    return args if kwargs is None else (args, kwargs)  # in files of earlier versions it was called without


def selected(module: nn.Module) -> Tensor | None:
    """The indices that a batch norm selects, (channels,) int64; None if it reads all."""
    indices: Tensor | None = getattr(module, SELECT, None)
    return indices


def drop_select(module: nn.Module) -> None:
    """Let a batch norm read all channels again."""
    hooks = module._forward_pre_hooks  # noqa: SLF001  # a copy of a module has the hook, but not its handle
    for key in [key for key, hook in hooks.items() if hook is select_channels]:
        del hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)  # noqa: SLF001
    if selected(module) is not None:
        delattr(module, SELECT)


def put_select(module: nn.Module, indices: tuple[int, ...], device: torch.device) -> Callable[[], None]:
    """Let a batch norm read these channels of its input; returns a function that restores the previous state."""
    old = selected(module)
    handle = module.register_forward_pre_hook(select_channels, with_kwargs=True) if old is None else None
    module.register_buffer(SELECT, torch.tensor(indices, dtype=torch.int64, device=device), persistent=False)

    def undo() -> None:
        if handle is None:
            setattr(module, SELECT, old)
        else:
            handle.remove()
            delattr(module, SELECT)

    return undo
