"""Two processes decide the same, end the same, and do it again the same way."""

import copy
from unittest import mock

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_fscreen import ScreeningPruningCallback, register_criterion, slim
from lightning_fscreen.ranking.criteria import CRITERIA
from lightning_fscreen.slimming.carried import plan_of
from lightning_fscreen.slimming.resize import reattach
from tests.conftest import Classifier, ConvNet, loader, trainer
from tests.processes import run_ranks
from tests.saving.test_checkpoints import equal
from tests.test_channel_fit import residual_net
from tests.test_unit_fit import Attentive

pytestmark = pytest.mark.slow

OPTIONS = {
    "ddp": {},
    "find-unused": {"find_unused_parameters": True},
    "static-graph": {"static_graph": True, "gradient_as_bucket_view": True},
    "accumulation": {},
    "clipping": {},
    "gradients": {},
    "at-start": {},
    "rewinding": {},
}
RECIPES = {
    "gradients": {"criterion": "taylor"},
    "at-start": {"criterion": "taylor", "end_epoch": 0},
    "rewinding": {"rewind_weights": True},
    "accumulation": {"end_epoch": None, "end_step": 3, "prune_every": 1},  # slims within an epoch of two steps
}
TRAINER = {"accumulation": {"accumulate_grad_batches": 3}, "clipping": {"gradient_clip_val": 0.1}}
FOR_ALL = ("ddp", "gradients", "rewinding")  # the others do not depend on what is pruned, but on when it is removed
CELLS = [("channel", option) for option in OPTIONS] + [("weight", "find-unused"), ("weight", "accumulation")]
CELLS += [(granularity, option) for granularity in ("weight", "unit") for option in FOR_ALL]
NETS = {"channel": residual_net, "weight": ConvNet, "unit": Attentive}
AMOUNT = {"channel": 0.5, "weight": 0.98, "unit": 0.5}


class Unused(nn.Module):
    """A part that no loss depends on."""

    def __init__(self, net):
        super().__init__()
        self.unused, self.net = nn.Linear(3, 3), net

    def forward(self, x):
        return self.net(x)


SEEN = {}


def remember(ranked, screening_weight, generator):
    """Magnitude, which keeps the F-statistics that it is shown (the first process decides)."""
    seen = {name: one for name, one in ranked.items() if one.unmatched is None}
    SEEN.update({name: one.f.clone() for name, one in seen.items()})
    SEEN.update({f"{name}, spread": one.spread.clone() for name, one in seen.items()})
    return {name: one.weight.abs() for name, one in ranked.items()}


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def train(granularity, option, processes=2):
    """A fit on 250 images, whose last batches are smaller than the others."""
    torch.manual_seed(0)
    net = NETS[granularity]()
    model = Classifier(Unused(net) if option == "find-unused" else net, momentum)
    exclude = "*unused" if (granularity, option) == ("weight", "find-unused") else None
    recipe = {"end_epoch": 2, **RECIPES.get(option, {})}
    callback = ScreeningPruningCallback(granularity, amount=AMOUNT[granularity], exclude=exclude, **recipe)
    strategy = {"strategy": DDPStrategy(**OPTIONS[option]), "devices": processes} if processes > 1 else {}
    run = trainer([callback], max_epochs=3, **strategy, **TRAINER.get(option, {}))
    run.fit(model, loader(batch_size=24, count=250))
    return {
        "parameters": dict(model.named_parameters()),
        "buffers": dict(model.named_buffers()),
        "masks": callback.masks,
        "plan": callback.plan.to_json(),
        "pruned": callback.report().pruned_fraction,
        "moved": all(
            "momentum_buffer" in run.optimizers[0].state[p] for p in model.net.parameters() if p.grad is not None
        ),
    }


def f_statistics(granularity, processes):
    """F of all candidates in float64, with weights and running statistics that stand still."""
    SEEN.clear()

    class Still(Classifier):
        def on_train_epoch_start(self):
            self.net.eval()

    torch.manual_seed(0)
    model = Still(NETS[granularity](), lambda p: torch.optim.SGD(p, lr=0.0))
    strategy = {"strategy": "ddp", "devices": processes} if processes > 1 else {}
    with mock.patch.dict(CRITERIA):
        register_criterion("remember", lambda screening_weight: True)(remember)
        callback = ScreeningPruningCallback(granularity, criterion="remember", end_epoch=1, schedule="one_shot")
        trainer([callback], max_epochs=1, precision="64-true", **strategy).fit(model, loader(batch_size=24, count=250))
    return dict(SEEN)


def main(folder):
    """In each of the processes."""
    results = {}
    for granularity, option in CELLS:
        runs = 2 if option == "ddp" else 1
        results[f"{granularity} {option}"] = [train(granularity, option) for _ in range(runs)]
    for granularity in NETS:
        results[f"{granularity} f"] = f_statistics(granularity, 2)
    torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    run_ranks(2, main, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(("granularity", "option"), CELLS)
def test_both_processes_end_the_same_and_twice_the_same(granularity, option, results):
    first, second = (rank[f"{granularity} {option}"] for rank in results)
    assert equal(first[0], first[-1]) and equal(second[0], second[-1])  # of plain DDP, two runs
    for part in ("parameters", "masks", "plan", "pruned", "moved"):
        assert equal(first[0][part], second[0][part]), part
    assert first[0]["moved"]
    assert abs(first[0]["pruned"] - AMOUNT[granularity]) < 0.02


@pytest.mark.parametrize("granularity", list(NETS))
def test_f_is_that_of_a_single_process(granularity, results):
    expected = f_statistics(granularity, 1)
    assert expected
    for name, f in expected.items():
        torch.testing.assert_close(results[0][f"{granularity} f"][name], f, rtol=1e-9, atol=0)


def test_synchronised_batch_norms_still_select_their_channels():
    network, x = residual_net().double(), torch.randn(4, 1, 8, 8).double()
    plan = slim(network, {"2.norm1": torch.arange(8) < 5, "3.norm1": torch.arange(8) > 1}, x)
    assert plan.selects
    expected = network.eval()(x)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert not plan_of(network).selects
    reattach(network, plan)
    assert torch.equal(network.eval()(x), expected) and plan_of(network).selects == plan.selects


def test_synchronised_batch_norms_are_slimmed_without_talking_to_other_processes(tmp_path):
    plain = residual_net().double()
    network = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    keep, x = {"2.norm1": torch.arange(8) < 5, "3.norm1": torch.arange(8) > 1}, torch.randn(4, 1, 8, 8).double()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:  # with a group they would refuse to run on a CPU
        assert slim(network, keep, x) == slim(plain, keep, x)
    finally:
        torch.distributed.destroy_process_group()
    assert type(network[2].norm1) is nn.SyncBatchNorm
    assert torch.equal(network.eval()(x), plain.eval()(x))
