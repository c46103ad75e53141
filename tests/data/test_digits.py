import numpy as np
import torch
from sklearn.datasets import load_digits

from lightning_fscreen.data import DigitsDataModule


def part(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_parts_are_stratified_and_make_up_the_data_set():
    data = DigitsDataModule(root="ignored")
    parts = [part(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert [len(labels) for _, labels in parts] == [1197, 300, 300]
    assert (data.num_classes, data.image_shape) == (10, (1, 8, 8))
    assert data.classes == [str(digit) for digit in range(10)]
    for _, labels in parts[1:]:
        assert 28 <= labels.bincount().min() <= labels.bincount().max() <= 32

    def rows(pixels, labels):
        return sorted(map(tuple, np.column_stack([pixels.reshape(1797, 64), labels]).tolist()))

    digits = load_digits()
    images, labels = (torch.cat(tensors).numpy() for tensors in zip(*parts, strict=True))
    assert images.dtype == np.uint8
    assert rows(images, labels) == rows(np.round(digits.images * 255 / 16).astype(int), digits.target)


def test_seed_moves_the_validation_images_only():
    first, second = DigitsDataModule(), DigitsDataModule(split_seed=1)
    assert torch.equal(part(first.test_dataloader())[0], part(second.test_dataloader())[0])
    assert not torch.equal(part(first.val_dataloader())[0], part(second.val_dataloader())[0])
