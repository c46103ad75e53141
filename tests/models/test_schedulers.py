from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from lightning_fscreen.models import ImageClassifier
from lightning_fscreen.models.schedulers import step_decay
from tests.conftest import trainer


def rates(steps, **arguments):
    """Learning rate of each step, from 1."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = step_decay(optimizer, T_max=steps, **arguments)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("steps", [8, 160])
def test_divides_by_ten_at_half_and_at_three_quarters(steps):
    quarter = steps // 4
    assert rates(steps) == pytest.approx([1] * 2 * quarter + [0.1] * quarter + [0.01] * quarter)


def test_milestones_and_factor():
    assert rates(10, milestones=[0.2, 0.3], gamma=0.5) == pytest.approx([1, 1, 0.5] + [0.25] * 7)
    assert rates(3, milestones=[]) == [1, 1, 1]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_short_training_starts_with_the_whole_learning_rate(steps):
    assert rates(steps, milestones=[0.1, 0.25])[0] == 1


@pytest.mark.parametrize("milestone", [0, 1, 80, -0.5])
def test_a_milestone_outside_the_training_is_refused(milestone):
    with pytest.raises(ValueError, match=rf"milestones are fractions .* got {milestone}"):
        rates(10, milestones=[0.5, milestone])


@pytest.mark.parametrize(("interval", "expected"), [("epoch", {2: 1, 3: 1}), ("step", {4: 1, 6: 1})])
def test_lasts_as_long_as_the_training(tmp_path, interval, expected):
    model = ImageClassifier(
        nn.Sequential(nn.Flatten(), nn.Linear(4, 3)),
        partial(SGD, lr=0.1),
        partial(step_decay, milestones=[0.5, 0.75]),
        num_classes=3,
        scheduler_interval=interval,
    )
    data = DataLoader(TensorDataset(torch.zeros(4, 1, 2, 2), torch.arange(4) % 3), batch_size=2)
    fit = trainer(max_epochs=4, default_root_dir=tmp_path)
    fit.fit(model, data)
    (config,) = fit.lr_scheduler_configs
    assert config.scheduler.milestones == expected
    assert config.scheduler.get_last_lr() == pytest.approx([0.1 * 0.1**2])


def test_its_state_is_safe_to_load(tmp_path):
    scheduler = step_decay(SGD([nn.Parameter(torch.zeros(1))], lr=1.0), T_max=8)
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["milestones"] == {4: 1, 6: 1}
