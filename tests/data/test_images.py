import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from lightning_fscreen.data import TensorImages
from lightning_fscreen.data.images import identity


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (10, 3, 4, 5), generator=generator).to(torch.uint8)
    return TensorImages(pixels, torch.arange(10, dtype=torch.int32) % 3)


def test_one_image_and_a_batch_agree(images):
    assert len(images) == 10
    assert images.classes == ["0", "1", "2"]
    batch, labels = images.__getitems__([7, 2, 7])
    assert torch.equal(batch, torch.stack([images[i][0] for i in (7, 2, 7)]))
    assert torch.equal(labels, torch.stack([images[i][1] for i in (7, 2, 7)]))
    assert labels.dtype == torch.int64


def test_loader_fetches_whole_batches(images):
    part = Subset(images, [9, 8, 1])
    first, second = DataLoader(part, batch_size=2, collate_fn=identity)
    assert torch.equal(first[0], images.images[[9, 8]])
    assert torch.equal(second[1], images.labels[[1]])


def test_identity_pickles():
    assert pickle.loads(pickle.dumps(identity)) is identity


@pytest.mark.parametrize(
    ("pixels", "labels", "classes", "message"),
    [
        (torch.zeros(2, 1, 3, 3), torch.zeros(2), None, "uint8"),
        (torch.zeros(2, 3, 3, dtype=torch.uint8), torch.zeros(2), None, r"\(N, C, H, W\)"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(3), None, "2 images"),
        (torch.zeros(0, 1, 3, 3, dtype=torch.uint8), torch.zeros(0), None, "at least one"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.tensor([0, 2]), ["a", "b"], r"0\.\.1, got 0\.\.2"),
    ],
)
def test_bad_input_is_refused(pixels, labels, classes, message):
    with pytest.raises(ValueError, match=message):
        TensorImages(pixels, labels, classes)
