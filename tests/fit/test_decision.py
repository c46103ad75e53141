from __future__ import annotations

import pytest
import torch

from lightning_fscreen import ScreeningPruningCallback
from lightning_fscreen.fit.decision import _first
from lightning_fscreen.ranking.criteria import CRITERIA, Criterion
from tests.conftest import Classifier, loader, mlp, trainer
from tests.test_channel_fit import residual_net


@pytest.fixture
def seen(monkeypatch):
    """The progress that a criterion of the name "spy" was told, ranking after ranking."""
    seen = []

    def spy(context):
        seen.append(context.progress)
        return {name: layer.weight.abs() for name, layer in context.layers.items()}

    monkeypatch.setitem(CRITERIA, "spy", Criterion(spy, lambda screening_weight: False))
    return seen


def fitted(**arguments):
    callback = ScreeningPruningCallback(granularity="weight", amount=0.8, criterion="spy", slim=False, **arguments)
    trainer([callback], max_epochs=5).fit(Classifier(mlp()), loader())
    return callback


def test_progress_is_the_share_pruned_before_and_1_when_the_rest_goes(seen):
    callback = fitted(schedule="linear", end_epoch=4)
    applied = [entry["applied"] / 0.8 for entry in callback.history]
    assert seen == pytest.approx([0, *applied[:2], 1], abs=1e-3)
    assert applied == pytest.approx([0.25, 0.5, 0.75, 1, 1], abs=1e-3)


@pytest.mark.parametrize("arguments", [{"schedule": "one_shot", "end_epoch": 3}, {"end_epoch": 0}])
def test_pruning_all_at_once_is_the_last_pruning(seen, arguments):
    fitted(**arguments)
    assert seen == [1.0]


def test_softly_pruned_values_that_grew_again_are_not_pruned_already(seen):
    fitted(schedule="linear", end_epoch=4, soft=True)
    assert seen[:3] == pytest.approx([0, 0, 0], abs=0.05) and seen[3:] == [1.0]


def test_evidence_is_gathered_once_a_pruning_and_handed_to_the_scores(monkeypatch):
    own, explained, handed = CRITERIA["screening"], [], []

    def explain(context):
        explained.append(own.explain(context))
        return explained[-1]

    def score(context):
        handed.append(context.explained)
        return own.score(context)

    monkeypatch.setitem(CRITERIA, "spy", Criterion(score, own.needs_statistics, explain=explain))
    callback = fitted(schedule="linear", end_epoch=3)
    assert len(explained) == len(handed) == 3
    assert all(one is other for one, other in zip(explained, handed, strict=True))
    assert callback.report().layers[0].evidence == explained[-1]["net.1"].to_dict()


@pytest.mark.parametrize("end_epoch", [0, 2])
def test_scores_that_are_all_equal_are_warned_of_and_empty_no_layer(end_epoch, caplog):
    """The scales of an untrained network, and of one that is trained."""
    callback = ScreeningPruningCallback(amount=0.5, end_epoch=end_epoch, schedule="linear", slim=False)
    trainer([callback], max_epochs=3).fit(Classifier(residual_net()), loader())
    warned = [record for record in caplog.records if "nothing tells the channels apart" in record.getMessage()]
    assert len(warned) == (end_epoch == 0)
    if end_epoch == 0:
        assert all(abs(layer.kept - layer.total / 2) <= 0.5 for layer in callback.report().layers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_idle_candidates_go_first_in_their_order_whatever_the_dtype(dtype):
    scores = {"a": torch.rand(300, 300).to(dtype), "b": torch.rand(70_000).to(dtype)}
    idle = {"a": torch.rand(300, 300) < 0.3, "b": torch.rand(70_000) < 0.3}
    ranked = _first(idle, scores, ["a", "b"])
    first = torch.cat([ranked[name][idle[name]].double() for name in ("a", "b")])
    assert first.isfinite().all() and (first.diff() > 0).all()
    others = torch.cat([ranked[name][~idle[name]].double() for name in ("a", "b")])
    assert first.max() < others.min()
    assert all(torch.equal(ranked[name][~idle[name]].to(dtype), scores[name][~idle[name]]) for name in scores)
