"""Slim networks leave PyTorch, or stay in it, and compute the same."""

import numpy as np
import onnxruntime
import pytest
import torch

from lightning_fscreen import find_gates, models, slim
from lightning_fscreen.saving.onnx import export_onnx
from tests.conftest import ONNX


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network, x = models.resnet20().eval(), torch.randn(2, 3, 16, 16)
    slim(network, {gate.name: torch.rand(gate.channels) > 0.4 for gate in find_gates(network, x)}, x)
    return network


@pytest.mark.skipif(not ONNX, reason="earlier exporters fail on batch norms")
def test_onnx_runs_at_any_batch_size(network, tmp_path):
    network.train()
    export_onnx(network, (torch.randn(2, 3, 16, 16),), tmp_path / "model.onnx")
    assert network.training and [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x = torch.randn(5, 3, 16, 16)
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert np.allclose(out, network.eval()(x).numpy(), rtol=1e-4, atol=1e-5)


def test_torch_export_and_compile(network):
    x = torch.randn(3, 3, 16, 16)
    network.eval()
    with torch.no_grad():
        expected = network(x)
        assert torch.equal(torch.export.export(network, (x,)).module()(x), expected)
        assert torch.allclose(torch.compile(network, backend="aot_eager")(x), expected, rtol=1e-5, atol=1e-6)


def test_a_missing_package_is_named(network, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"need onnx; .*lightning-fscreen\[onnx\]"):
        export_onnx(network, (torch.randn(2, 3, 16, 16),), tmp_path / "model.onnx")


@pytest.mark.skipif(not ONNX, reason="earlier exporters fail on batch norms")
def test_onnx_of_a_network_that_takes_its_inputs_by_name(tmp_path):
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 3)

        def forward(self, ids, scale=1.0, mask=None):
            return self.head((self.words(ids) * scale * mask[..., None]).mean(1))

    network, ids = Masked(), torch.randint(9, (4, 5))
    mask = (ids > 3).float()
    export_onnx(network, (ids[:1],), tmp_path / "model.onnx", {"mask": mask[:1]})
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [each.name for each in session.get_inputs()]
    (out,) = session.run(None, dict(zip(names, (ids.numpy(), mask.numpy()), strict=True)))
    torch.testing.assert_close(torch.from_numpy(out), network(ids, mask=mask).detach(), rtol=1e-4, atol=1e-5)
