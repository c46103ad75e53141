from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import FrozenInstanceError, fields

import pytest
from hydra.utils import instantiate

from lightning_fscreen import Latency, ScreeningPruningCallback
from lightning_fscreen.fit.settings import HasSettings, Settings
from lightning_fscreen.ranking.schedule import cubic, linear
from lightning_fscreen.statistics.labels import find_labels

NAMES = [field.name for field in fields(Settings)]
GIVEN = {
    "granularity": "channel",
    "amount": 0.31,
    "screening_weight": 0.7,
    "schedule": linear,
    "start_epoch": 2,
    "end_epoch": 9,
    "scope": "layer",
    "criterion": "taylor",
    "min_channels": 3,
    "include": "net.*",
    "exclude": ["net.1"],
    "num_classes": 7,
    "labels": len,
    "slim": False,
    "collect_every": 5,
    "collect_epochs": 4,
    "connections": "factored",
    "bias": "fold",
    "feature": "output",
    "rewind_lr": True,
    "rewind_weights": False,
    "soft": True,
    "start_step": None,
    "end_step": None,
    "prune_every": None,
    "budget": "latency",
    "round_to": 8,
    "streams": True,
    "latency": Latency(2),
}


def test_every_argument_is_a_setting_and_can_be_read_under_its_name() -> None:
    arguments = [name for name in inspect.signature(ScreeningPruningCallback).parameters]
    assert arguments == NAMES == list(GIVEN)
    callback = ScreeningPruningCallback(**GIVEN)  # type: ignore[arg-type]
    assert {name: getattr(callback, name) for name in NAMES} == GIVEN
    assert {name: getattr(callback.settings, name) for name in NAMES} == GIVEN
    assert [name for name in vars(HasSettings) if name in NAMES] == NAMES


def test_defaults_are_resolved() -> None:
    callback = ScreeningPruningCallback(schedule="cubic")
    assert callback.schedule is cubic and callback.labels is find_labels


@pytest.mark.parametrize("name", NAMES)
def test_settings_cannot_be_changed(name: str) -> None:
    callback = ScreeningPruningCallback()
    with pytest.raises(
        AttributeError, match=rf"{name} of a ScreeningPruningCallback cannot be changed; make a new one"
    ):
        setattr(callback, name, 2)
    with pytest.raises(FrozenInstanceError):
        setattr(callback.settings, name, 2)
    assert getattr(callback, name) == getattr(ScreeningPruningCallback(), name)


def test_copies_are_equal() -> None:
    callback = ScreeningPruningCallback(**GIVEN)  # type: ignore[arg-type]
    for made in (copy.copy(callback), copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert made.settings == callback.settings and made.amount == 0.31
        assert made.state_key == callback.state_key and "ScreeningPruningCallback" in repr(made)


def test_hydra_can_make_one() -> None:
    target = {"_target_": "lightning_fscreen.ScreeningPruningCallback", "amount": 0.5, "include": ["a", "b"]}
    callback = instantiate(target, _convert_="all")
    assert (callback.amount, callback.include) == (0.5, ["a", "b"])


def test_a_subclass_may_have_attributes_of_its_own() -> None:
    class Named(ScreeningPruningCallback):
        def __init__(self, name: str) -> None:
            super().__init__(amount=0.25)
            self.name = name

    assert Named("a").name == "a" and Named("a").amount == 0.25
