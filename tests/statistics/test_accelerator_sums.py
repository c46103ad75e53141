"""Sums on accelerators: few kernels, no waiting, no products in float64, as exact as in float64."""

import numpy as np
import pytest
import torch
import torchvision
from sklearn.feature_selection import f_classif
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fscreen.candidates.channels import Channels
from lightning_fscreen.functional import f_statistic
from lightning_fscreen.ranking.budgeted import rank_and_prune
from lightning_fscreen.statistics.collector import ActivationCollector
from lightning_fscreen.statistics.moments import accumulate_moments_, empty_moments
from lightning_fscreen.statistics.probes import Probe
from tests.pretended import CPU, is_real, pretended, pretending

CUDA = torch.device("cuda", 0)
_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm_.default, _aten.addmm.default, _aten.mv.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default}


def is_view(func):
    returned = func._schema.returns[0].alias_info if func._schema.returns else None
    return returned is not None and not returned.is_write


class Kernels(TorchDispatchMode):
    """Counts what would be launched on the pretended device, and indices that would be copied to it."""

    def __init__(self):
        super().__init__()
        self.count, self.products, self.indices = 0, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operands = [value for value in pytree.tree_leaves((args, kwargs or {})) if is_real(value)]
        devices = [pretended(value) for value in operands]
        if CUDA in devices and not is_view(func):
            self.count += 1
            self.products += [operands[0].dtype] if func in _PRODUCTS else []
            self.indices += func in _INDEXED and CPU in [pretended(value) for value in operands if value.ndim]
        return func(*args, **(kwargs or {}))


def resnet(images=4):
    """ResNet-50 on the pretended device, small images, and the sums over its channels."""
    net = torchvision.models.resnet50(num_classes=10).to("cuda")
    x, labels = torch.randn(images, 3, 32, 32).to("cuda"), torch.arange(images).to("cuda")
    channels = Channels(net, None, None)
    channels.learn(net, (x,), {})
    return net, x, labels, channels.collector(10)


def test_a_flush_of_resnet_50_takes_few_kernels_and_waits_for_none():
    with pretending() as operators:
        net, x, labels, collector = resnet()
        features = sum(probe.num_features for probe in collector._probes)
        steps = []
        for gathers in (False, True, True):
            if gathers:
                collector.attach()
            operators.waits.clear()
            with Kernels() as step:
                net(x)
                collector.remove()
                if gathers and steps[1:]:  # the labels of an epoch's first batch are checked
                    operators.waits.clear()
                collector.update(labels)
            assert not operators.waits or not steps[1:]
            steps.append(step.count)
        ordinary, _, gathering = steps
        assert gathering - ordinary <= 3 * len(collector._probes)  # activation function, mean, …; and one row is kept
        indices, mixed = torch.randint(10, (256,)), torch.rand(256, 10).softmax(1)
        for labels, products in ((indices, set()), (indices, set()), (mixed, {torch.float32})):
            collector._buffer.restore(torch.randn(256, features).to("cuda"), [labels.to("cuda")])
            operators.waits.clear()
            with Kernels() as flush:
                collector._flush()
            assert flush.count <= 40 and set(flush.products) == products and not operators.waits


def test_a_step_in_which_a_layer_did_not_run_copies_no_indices():
    net = nn.ModuleDict({name: nn.Linear(3, 3) for name in "abc"})
    with pretending() as operators:
        net.to("cuda")
        collector = ActivationCollector([Probe(name, module) for name, module in net.items()], 2)
        x, labels = torch.randn(8, 3).to("cuda"), (torch.arange(8) % 2).to("cuda")
        collector.attach()
        for names in ("abc", "ab", "c"):
            operators.waits.clear()
            with Kernels() as kernels:
                for name in names:
                    net[name](x)
                collector.update(labels)
            assert kernels.indices == 0
        assert not operators.waits


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("mean", [0.0, 1000.0, -3e4])
@pytest.mark.parametrize("rows", [96, 20_000])
def test_f_is_that_of_scikit_learn(mean, rows, ignored):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (rows,), generator=generator)
    x = torch.randn(rows, 12, generator=generator) + 0.1 * labels[:, None] * torch.arange(12) + mean
    if ignored:
        labels[::7] = -100
    counted = x[labels >= 0].double()
    expected, _ = f_classif((counted - mean).numpy(), labels[labels >= 0].numpy())  # it cancels far from zero
    with pretending():
        layer = nn.Linear(12, 2).to("cuda")
        collector = ActivationCollector([Probe("layer", layer)], 5)
        collector.attach()
        for batch, own in zip(x.split(48), labels.split(48), strict=True):
            layer(batch.to("cuda"))
            collector.update(own.to("cuda"))
        found = collector.statistics()["layer"]
        np.testing.assert_allclose(found.f.cpu().numpy(), expected, rtol=1e-5)
        np.testing.assert_allclose(found.mean.cpu().numpy(), counted.mean(0).numpy(), atol=1e-7, rtol=1e-9)
        np.testing.assert_allclose(found.variance.cpu().numpy(), counted.var(0, correction=0).numpy(), rtol=1e-6)


@pytest.mark.parametrize("rows", [96, 20_000])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_f_of_mixed_classes_is_that_of_scikit_learn_whatever_autocast_rounds(device, rows):
    generator = torch.Generator().manual_seed(0)
    x, quarters = torch.randn(rows, 12, generator=generator), torch.randint(3, (rows, 4), generator=generator)
    x += 0.1 * quarters.float().mean(1, keepdim=True) * torch.arange(12)
    copies, found = x.repeat_interleave(4, 0).double().numpy(), []
    mixed = nn.functional.one_hot(quarters).float().mean(1)
    with pretending():
        for rounds in (False, True):
            collector = ActivationCollector([Probe("layer", nn.Linear(12, 2).to(device))], 3)
            with torch.autocast(device, torch.bfloat16, enabled=rounds):
                collector._sums.add([0], x.clone().to(device), [mixed.to(device)], 0, {})
            statistics = collector.statistics()["layer"]
            found.append((statistics.f.cpu().numpy(), statistics.spread.cpu().numpy()))
    expected = [
        f_classif(values, quarters.flatten().numpy())[0] * (rows - 3) / (4 * rows - 3)
        for values in (copies, (copies - copies.mean(0)) ** 2)
    ]
    for statistic in found:
        np.testing.assert_allclose(statistic, expected, rtol=1e-4, atol=1e-4)


def test_sums_of_float32_rows_are_those_of_a_loop_in_float64():
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(3000, 5, generator=generator), torch.randint(-1, 5, (3000,), generator=generator)
    expected = torch.zeros(2, 4, 5, dtype=torch.float64)
    powers = torch.zeros(2, 5, dtype=torch.float64)
    for row, label in zip(rows.double(), labels.tolist(), strict=True):
        if 0 <= label < 4:  # 4 is out of range here, and counts for nothing as -100 does
            expected[:, label] += torch.stack([row, row**2])
            powers += torch.stack([row**3, row**4])
    with pretending():
        moments = empty_moments(4, 5, CUDA)
        accumulate_moments_(moments, rows.to("cuda"), labels.to("cuda"))
        found = [part.cpu() for part in moments]
    torch.testing.assert_close(torch.stack(found[2:4]), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(torch.stack(found[4:]), powers, rtol=1e-6, atol=1e-3)
    assert torch.equal(found[1], torch.tensor([(labels == label).sum() for label in range(4)]).double())


def test_the_plain_statistic_is_that_on_the_cpu():
    x, labels = torch.randn(200, 7) + 50, torch.randint(3, (200,))
    labels[::9] = -100
    with pretending():
        found = f_statistic(x.to("cuda"), labels.to("cuda"), 3).cpu()
    torch.testing.assert_close(found, f_statistic(x[labels >= 0], labels[labels >= 0], 3), rtol=1e-9, atol=1e-9)


def test_bad_values_are_still_found_with_their_batch():
    with pretending():
        layer = nn.Linear(3, 2).to("cuda")
        collector = ActivationCollector([Probe("layer", layer)], 2)
        collector.attach()
        for batch in range(4):
            x = torch.randn(6, 3)
            x[2, 1] = torch.inf if batch == 2 else x[2, 1]
            layer(x.to("cuda"))
            collector.update((torch.arange(6) % 2).to("cuda"))
        with pytest.raises(ValueError, match="'layer', first in batch 2 of the epoch"):
            collector.statistics()


def test_the_coupled_channels_of_all_layers_are_asked_for_at_once():
    generator = torch.Generator().manual_seed(0)
    names = [f"layer{index}" for index in range(20)]
    waits = []
    with pretending() as operators:
        for count in (10, 20):
            scores = {name: torch.rand(6, generator=generator).to("cuda") for name in names[:count]}
            kept = {name: torch.ones(6, dtype=torch.bool).to("cuda") for name in names[:count]}
            units = {name: torch.arange(6).to("cuda") for name in names[:count]}
            operators.waits.clear()
            masks = rank_and_prune(scores, kept, 0.5, scope="layer", units=units)
            waits.append([where for what, where in operators.waits if what == "tolist" and "budgeted" in where])
    assert [len(found) for found in waits] == [1, 1] and sum(int(mask.sum()) for mask in masks.values()) == 60
