"""Lightning checkpoints of networks of any size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule

from lightning_fscreen.files import is_safetensors
from lightning_fscreen.slimming.plan import PlanError
from lightning_fscreen.slimming.state import resize_on_load

Model = TypeVar("Model", bound=LightningModule)


def load_from_checkpoint(cls: type[Model], path: str | os.PathLike[str], /, **arguments: Any) -> Model:
    """`cls.load_from_checkpoint` for checkpoints of any size: of a dense network, or written after slimming.

    Args:
        cls: the LightningModule's class.
        path: a checkpoint that Lightning wrote, with weights only or whole.
        arguments: of `LightningModule.load_from_checkpoint`: map_location, hparams_file, strict, those of cls (also
            such as are called `path`).

    Returns:
        The model, as small as it was when it was saved. The file is read with `weights_only=True`.

    Raises:
        PlanError: the plan in the file is damaged or was made for another model; the file is of `save_slimmed`.
    """
    if Path(path).is_file() and is_safetensors(path):
        raise PlanError(
            f"{os.fspath(path)!r} is a safetensors file and no checkpoint of Lightning; load it with "
            f"load_slimmed({cls.__name__}(…), path), or, if only a part of it was saved, load_slimmed(model.net, path)"
        )

    class Resizing(cls):  # type: ignore[valid-type,misc]  # Lightning loads as soon as it has made an instance
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            stop = resize_on_load(self)
            try:
                return super().load_state_dict(*args, **kwargs)
            finally:
                stop()

    Resizing.__name__, Resizing.__qualname__, Resizing.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    model: Model = Resizing.load_from_checkpoint(path, **{"weights_only": True, **arguments})
    model.__class__ = cls
    return model
