"""Networks under torch.compile: steps that hooks observe run eagerly."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from lightning_fscreen.modules import uncompiled


def is_compiled(model: nn.Module) -> bool:
    """Whether a module, or a part of it, is compiled."""
    if getattr(model, "_compiler_ctx", None) is not None:  # how Lightning keeps torch.compile(pl_module)
        return True
    # torch has no public way to ask for `module.compile()`.
    return any(uncompiled(module) is not module or module._compiled_call_impl for module in model.modules())  # noqa: SLF001


class Eagerly:
    """Lets compiled code run as it was written, between `start` and `stop`.

    Compiled graphs do not see hooks that came after them. Nothing is thrown away: the graphs are used again afterwards.

    Args:
        model: nothing is done unless it is compiled.
    """

    def __init__(self, model: nn.Module) -> None:
        self._compiled = is_compiled(model)
        self._stack = contextlib.ExitStack()

    def start(self) -> None:
        """Run eagerly from here on."""
        if self._compiled:
            self.stop()
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))

    def stop(self) -> None:
        """Use compiled code again."""
        self._stack.close()

    def recompile(self) -> None:
        """Compile what has changed when it runs next."""
        if self._compiled:
            torch.compiler.reset()
