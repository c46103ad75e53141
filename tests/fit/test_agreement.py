"""Where a network cannot become smaller in one process, it stays as it is in all, and training goes on."""

import os
from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_fscreen import ScreeningPruningCallback
from lightning_fscreen.fit import distributed
from lightning_fscreen.fit.distributed import all_or_none
from lightning_fscreen.slimming import SlimmingPlan, VerificationError
from lightning_fscreen.slimming.verify import Verification
from tests.conftest import Classifier, ConvNet, loader, trainer
from tests.processes import run_ranks
from tests.test_channel_fit import residual_net

NETS = {"channel": residual_net, "weight": ConvNet}


def fails(self, new):
    raise VerificationError("the outputs would change in this process")


def main(folder):
    """In each of the processes; the second one's verification fails."""
    results = {}
    for granularity, net in NETS.items():
        torch.manual_seed(0)
        model = Classifier(net())
        before = [tuple(p.shape) for p in model.parameters()]
        callback = ScreeningPruningCallback(granularity, amount=0.5 if granularity == "channel" else 0.98, end_epoch=1)
        strategy = DDPStrategy(timeout=timedelta(seconds=20))
        run = trainer([callback], max_epochs=3, strategy=strategy, devices=2)
        failing = os.environ["LOCAL_RANK"] == "1"
        check = fails if failing else Verification.check
        with mock.patch.object(Verification, "check", check):
            run.fit(model, loader(batch_size=24, count=120))
        results[granularity] = {
            "same sizes": before == [tuple(p.shape) for p in model.parameters()],
            "plan": callback.plan is None,
            "reason": callback.report().not_removed,
            "steps": run.global_step,
            "parameters": {name: p.detach() for name, p in model.named_parameters()},
        }
    torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    run_ranks(2, main, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("granularity", list(NETS))
def test_both_processes_go_on_with_the_whole_network(granularity, results):
    for rank in results:
        own = rank[granularity]
        assert own["same sizes"] and own["plan"] and own["steps"] == 9
        assert own["reason"] == "in process 1: the outputs would change in this process"
    for name, parameter in results[0][granularity]["parameters"].items():
        assert torch.equal(parameter, results[1][granularity]["parameters"][name]), name


class Unforeseen(RuntimeError):
    pass


def agree_with(others, attempt):
    """What a process does whose neighbours say this: their plans, or their errors."""
    asked = []

    def gather(trainer, value):
        asked.append(value)
        return [value, *others]

    with (
        mock.patch.object(distributed, "gather", gather),
        mock.patch.object(torch.distributed, "is_initialized", lambda: True),
        all_or_none(SimpleNamespace(world_size=1 + len(others))) as agree,
    ):
        attempt(agree)
    return len(asked)


PLAN = SlimmingPlan(shapes={"a.weight": (4, 3)}, cuts={"a.weight": {0: (0, 2)}})
OTHER = SlimmingPlan(shapes={"a.weight": (4, 3)}, cuts={"a.weight": {0: (0, 1)}})


def raising(error):
    def attempt(agree):
        raise error

    return attempt


def agreed(plan):
    return lambda agree: agree(plan)


def test_all_that_succeed_alike_go_on():
    assert agree_with([(None, PLAN.to_json())], agreed(PLAN)) == 1
    assert agree_with([(None, SlimmingPlan().to_json())], lambda agree: None) == 1


@pytest.mark.parametrize(
    ("others", "attempt", "error", "message"),
    [
        ([(("too bad", True), "")], agreed(PLAN), VerificationError, "in process 1: too bad"),
        ([(None, PLAN.to_json())], raising(VerificationError("too bad")), VerificationError, "in process 0: too bad"),
        ([(("too bad", True), "")], raising(VerificationError("too bad")), VerificationError, "^too bad"),
        ([(None, OTHER.to_json())], agreed(PLAN), VerificationError, "different parts"),
        ([(None, OTHER.to_json())], lambda agree: None, VerificationError, "different parts"),
        ([(None, PLAN.to_json())], raising(Unforeseen("no memory")), Unforeseen, "no memory"),
        ([(("no memory", False), "")], agreed(PLAN), RuntimeError, "process 1 failed .* no memory"),
        (
            [(("no", True), ""), (("no memory", False), "")],
            raising(VerificationError("no")),
            RuntimeError,
            "process 2 failed",
        ),
    ],
)
def test_if_one_fails_all_do(others, attempt, error, message):
    with pytest.raises(error, match=message):
        agree_with(others, attempt)
