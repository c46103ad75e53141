"""A model takes the size of the checkpoint that is loaded into it: the plan travels with the state_dict."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_fscreen.slimming.plan import PlanError, SlimmingPlan, plan_of
from lightning_fscreen.slimming.resize import grow, slim_like

PLAN_KEY = "fscreen_plan"
"""Key of a state_dict: the JSON text of the plan, (bytes,) uint8."""

Model = TypeVar("Model", bound=LightningModule)


def load_from_checkpoint(cls: type[Model], path: str | os.PathLike[str], **arguments: Any) -> Model:
    """`cls.load_from_checkpoint` for checkpoints of any size: of a dense network, or written after slimming.

    Args:
        cls: the LightningModule's class.
        path: a checkpoint that Lightning wrote, with weights only or whole.
        arguments: of `LightningModule.load_from_checkpoint`: map_location, hparams_file, strict, those of cls.

    Returns:
        The model, as small as it was when it was saved. The file is read with `weights_only=True`.

    Raises:
        PlanError: the plan in the file is damaged or was made for another model.
    """

    class Resizing(cls):  # type: ignore[valid-type,misc]  # Lightning loads as soon as it has made an instance
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            handle = resize_on_load(self)
            try:
                return super().load_state_dict(*args, **kwargs)
            finally:
                handle.remove()

    Resizing.__name__, Resizing.__qualname__, Resizing.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    model: Model = Resizing.load_from_checkpoint(path, **{"weights_only": True, **arguments})
    model.__class__ = cls
    if plan_of(model):
        carry_plan(model)
    return model


def carry_plan(model: nn.Module) -> None:
    """Let the state_dict of a slimmed model hold its plan, and let the model take the size of what it loads."""
    if _save not in model._state_dict_hooks.values():  # noqa: SLF001  # torch gives no public list
        model.register_state_dict_post_hook(_save)
        model.register_load_state_dict_pre_hook(_load)


def resize_on_load(model: nn.Module) -> RemovableHandle:
    """Let a model take the size of the state_dicts that are loaded into it, until the handle is removed."""
    handle: RemovableHandle = model.register_load_state_dict_pre_hook(_load)
    return handle


def _save(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    if plan := plan_of(module):
        state_dict[prefix + PLAN_KEY] = torch.frombuffer(bytearray(plan.to_json().encode()), dtype=torch.uint8)


def _load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before anything is loaded: be as large as what will be.

    Raises:
        PlanError: the plan is damaged or does not fit; the model is as it was then.
    """
    saved = state_dict.pop(prefix + PLAN_KEY, None)
    own = plan_of(module)
    if saved is not None:
        plan = _decode(saved)
        if not _same(plan, own):
            undo = grow(module)
            try:
                slim_like(module, plan)
            except PlanError:
                undo()
                raise
            carry_plan(module)
    elif own and _is_full_size(own, state_dict, prefix):
        grow(module)


def _decode(saved: Any) -> SlimmingPlan:
    try:
        text = bytes(saved.cpu().numpy()).decode()
    except (AttributeError, TypeError, UnicodeDecodeError) as error:
        raise PlanError(f"{PLAN_KEY!r} in the state_dict is no slimming plan: {error}") from error
    return SlimmingPlan.from_json(text)


def _same(first: SlimmingPlan, second: SlimmingPlan) -> bool:
    return all(
        getattr(first, field) == getattr(second, field) for field in ("shapes", "cuts", "groups", "biases", "selects")
    )


def _is_full_size(plan: SlimmingPlan, state_dict: Mapping[str, Any], prefix: str) -> bool:
    """Whether the tensors that the plan cuts have their size before it."""
    present = [(state_dict[prefix + name], shape) for name, shape in plan.shapes.items() if prefix + name in state_dict]
    return bool(present) and all(tuple(tensor.shape) == shape for tensor, shape in present)
