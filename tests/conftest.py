"""Small real classifiers and data, shared by the tests."""

import functools
import os
import warnings

# Before torch is imported: workers share the processors, and so do the processes that they start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(share, 1)))

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import settings
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.torch_version import TorchVersion
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore", module="lightning")


# The same examples in every run of CI; other ones, and more of them, at a developer's.
settings.register_profile("ci", derandomize=True, deadline=None)
collect_ignore = ["benchmarks"]  # commands, some of which need more than the tests do

ONNX = TorchVersion(torch.__version__) >= (2, 11)  # the exporter of torch 2.6 fails on batch norms

if os.environ.get("CI"):
    settings.load_profile("ci")


class Classifier(pl.LightningModule):
    """The smallest LightningModule that trains `net`."""

    def __init__(self, net, make_optimizer=None):
        super().__init__()
        self.net = net
        self.make_optimizer = make_optimizer or (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3))
        self.losses = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class ConvNet(nn.Module):
    """Convolutions with and without batch norm, a residual sum, a linear head; 8 × 8 images."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 1, bias=False)
        self.head = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.left(x) + self.right(x))
        return self.head(torch.flatten(F.max_pool2d(x, 2), 1))


def mlp(inputs=64, hidden=32, classes=10):
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


read_digits = functools.cache(load_digits)


def digits(count=256):
    """Images (N, 1, 8, 8) in [0, 1] and labels of scikit-learn's handwritten digits."""
    data = read_digits()
    images = torch.tensor(data.images[:count], dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(data.target[:count], dtype=torch.int64)


def loader(batch_size=64, count=256, shuffle=False):
    return DataLoader(TensorDataset(*digits(count)), batch_size=batch_size, shuffle=shuffle)


def trainer(callbacks=(), **arguments):
    defaults = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **arguments})


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
