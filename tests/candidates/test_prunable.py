"""The layers whose units can be pruned."""

from dataclasses import replace

import pytest
import torch
from sklearn.feature_selection import f_classif
from torch import nn
from torch.nn import functional as F

from lightning_fscreen.candidates.prunable import FEATURES, find_units, refine
from lightning_fscreen.slimming import Gate
from lightning_fscreen.statistics.collector import ActivationCollector
from lightning_fscreen.statistics.features import Activation


def network():
    return nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(2, affine=False))


def test_batch_norms_are_found_in_order_with_the_reasons_for_the_others():
    found, reasons = find_units(network(), ["channel"], exclude="2")
    assert [candidate.name for candidate in found] == ["0", "1"]
    assert reasons == {"2": "left out by exclude=['2']", "3": "it has no scale and shift (affine=False)"}
    with pytest.raises(ValueError, match="matches no layer"):
        find_units(network(), ["channel"], include="conv*")


FEATURES_OF = {
    "activation": lambda out: out.relu(),
    "activation_square": lambda out: out.relu() ** 2,
    "output": lambda out: out,
    "output_square": lambda out: out**2,
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("activated", [True, False])
def test_f_of_every_feature_is_that_of_f_classif(feature, activated):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)).double()
    nn.init.normal_(network[1].bias)
    x, labels = torch.randn(60, 1, 5, 5, dtype=torch.float64), torch.randint(3, (60,))
    candidate = replace(
        find_units(network, ["channel"])[0][0], activation=Activation(F.relu, F.relu_) if activated else None
    )
    collector = ActivationCollector([candidate.probe(feature)], 3)
    collector.attach()
    network(x)
    collector.remove()
    collector.update(labels)
    found = collector.statistics()["1"]
    wanted = feature if activated else feature.replace("activation", "output")
    with torch.no_grad():
        values = FEATURES_OF[wanted](network[1](network[0](x))).mean((2, 3))
    torch.testing.assert_close(found.f, torch.from_numpy(f_classif(values.numpy(), labels.numpy())[0]))
    torch.testing.assert_close(found.mean, values.mean(0))


def test_channels_coupled_to_what_is_left_out_stay_with_it():
    found, _ = find_units(network(), ["channel"], exclude="2")
    gates = {
        "0": Gate("0", 3, 0, (7, 8, 9)),
        "1": Gate("1", 4, 1, (10, 11, 12, 13)),
        "2": Gate("2", 4, 1, (10, 11, 20, 21)),
    }
    left, reasons = refine(found, gates, {"0": Activation(F.relu)})
    assert [candidate.units.tolist() for candidate in left] == [[7, 8, 9], [-1, -1, 12, 13]] and reasons == {}
    assert left[0].activation == Activation(F.relu) and left[1].activation is None
    gates["2"] = Gate("2", 4, 1, (10, 11, 12, 13))
    gates["0"] = Gate("0", 3, 0, (-1, -1, -1), "a reason")
    _, reasons = refine(found, gates, {})
    assert reasons == {"0": "a reason", "1": "it is coupled to '2', which is not pruned"}
    assert refine(found, {}, {})[1]["0"] == "it is not part of the network that the training step calls"


def test_units_that_could_only_go_all_together_stay():
    found, _ = find_units(network(), ["channel"], exclude="2")
    gates = {"0": Gate("0", 3, 0, (7, 7, 7)), "1": Gate("1", 4, 0, (7, 11, 12, 13))}
    left, reasons = refine(found, gates, {})
    assert [candidate.units.tolist() for candidate in left] == [[-1, 11, 12, 13]]
    assert reasons == {"0": "its units can only be pruned all together, and a layer keeps at least one"}
