"""Padding has no part in a mean: that of every instance cut to its own length, in a loop, is the reference."""

from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn.feature_selection import f_classif
from torch import nn

from lightning_fscreen import ScreeningPruningCallback, screen
from lightning_fscreen.statistics.features import Activation, PositionMeans
from lightning_fscreen.statistics.padding import Tokens, find_tokens
from tests.conftest import trainer

LENGTHS = [5, 1, 3, 0]
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize(
    ("module", "shape", "dimension"),
    [
        (nn.Linear(6, 2), (4, 5, 6), 1),
        (nn.Linear(6, 2), (4, 5, 3, 6), 1),
        (nn.Linear(6, 2), (4, 3, 5, 6), 2),
        (nn.Conv1d(6, 2, 1), (4, 6, 5), 2),
        (nn.BatchNorm1d(6), (4, 6, 5), 2),
    ],
)
def test_tokens_that_a_mask_drops_have_no_influence(module, shape, dimension, square, dtype):
    values = (200 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    values.masked_fill_(
        ~MASK.view([len(MASK), *[5 if each == dimension else 1 for each in range(1, len(shape))]]), torch.nan
    )
    means = PositionMeans()(values, module, Activation(torch.relu), square, Tokens(MASK))
    for index, length in enumerate(LENGTHS):
        own = values[index].double().relu().narrow(dimension - 1, 0, length)
        own = (own.square() if square else own).movedim(-1 if isinstance(module, nn.Linear) else 0, 0).flatten(1)
        expected = own.mean(1) if length else torch.zeros(6, dtype=torch.float64)
        torch.testing.assert_close(means[index].double(), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 6, 6), (3, 5, 6), (4, 5, 5, 6), (4, 6)])
def test_all_positions_count_where_it_is_not_clear_which_are_tokens(shape):
    values = torch.randn(shape, dtype=torch.float64)
    means = PositionMeans()(values, nn.Linear(6, 2), tokens=Tokens(MASK))
    torch.testing.assert_close(means, values.flatten(1, -2).mean(1) if len(shape) > 2 else values)


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": MASK.long(), "attention_mask": MASK.long()},
        ({"input_ids": MASK.long(), "attention_mask": MASK}, torch.zeros(4)),
        SimpleNamespace(attention_mask=MASK.int()),
    ],
)
def test_the_mask_is_found_in_the_batch(batch):
    found = find_tokens(batch)
    values = torch.randn(4, 5, 6)
    assert found is not None
    torch.testing.assert_close(found.mean(values, (1,), 1), Tokens(MASK).mean(values, (1,), 1), rtol=0, atol=0)


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(4, 5),
        (torch.zeros(4, 5), torch.zeros(4)),
        "text",
        {"attention_mask": MASK.float()},
        {"attention_mask": MASK[:, None]},
        {"attention_mask": None},
    ],
)
def test_batches_without_a_mask_that_can_be_read_are_averaged_over_all_positions(batch):
    assert find_tokens(batch) is None


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(9, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(self.embedding(input_ids)).relu() * attention_mask[..., None]
        return self.head(hidden).sum(1) / attention_mask.sum(1, keepdim=True)


def test_f_of_a_network_of_tokens_is_that_of_the_means_over_the_real_ones():
    torch.manual_seed(0)
    net, ids, lengths = Tagger(), torch.randint(9, (60, 7)), torch.randint(1, 8, (60,))
    mask, labels = (torch.arange(7) < lengths[:, None]).long(), torch.randint(3, (60,))
    batches = [
        {"input_ids": ids[part], "attention_mask": mask[part], "labels": labels[part]}
        for part in torch.arange(60).split(20)
    ]
    f = screen(net, batches, progress=False)["inner"]
    rows = [net.embedding(own[:length]).mean(0) for own, length in zip(ids, lengths, strict=True)]
    expected, _ = f_classif(torch.stack(rows).detach().double().numpy(), labels.numpy())
    np.testing.assert_allclose(f.numpy(), expected, rtol=1e-4)


class Texts(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Tagger()

    def training_step(self, batch, index):
        logits = self.net(batch["input_ids"], next(batch[key] for key in batch if "mask" in key))
        return nn.functional.cross_entropy(logits, batch["labels"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("key", ["attention_mask", "another_mask"])
def test_what_the_padding_holds_decides_nothing_in_a_fit(key):
    torch.manual_seed(0)
    lengths, ids, labels = torch.randint(1, 8, (120,)), torch.randint(1, 9, (120, 7)), torch.randint(3, (120,))
    mask = torch.arange(7) < lengths[:, None]
    left = []
    for padding in (torch.zeros_like(ids), 1 + labels[:, None].expand(-1, 7)):
        rows = [
            {"input_ids": i, key: m, "labels": y}
            for i, m, y in zip(ids.where(mask, padding), mask, labels, strict=True)
        ]
        callback = ScreeningPruningCallback(
            "unit", 0.5, schedule="one_shot", criterion="screening_sum", screening_weight=1
        )
        model = Texts()
        trainer([callback], max_epochs=2).fit(model, torch.utils.data.DataLoader(rows, batch_size=30))
        left.append(callback.plan.cuts["net.inner.weight"][0])
    assert (left[0] == left[1]) == (key == "attention_mask")
