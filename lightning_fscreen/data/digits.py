"""Scikit-learn's handwritten digits, which need no download."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from lightning_fscreen.data.datamodule import ImageDataModule, stratified_split
from lightning_fscreen.data.images import TensorImages

TEST_SIZE = 300


class DigitsDataModule(ImageDataModule):
    """1,797 images of handwritten digits, 1 × 8 × 8: by default 1,197 to train on, 300 for validation, 300 for testing.

    Both splits are stratified. The test images are the same for every ``split_seed``. The 17 grey levels v of the data
    set become uint8 as round(255 · v / 16).

    Args:
        val_size: number or fraction of the 1,497 training images set aside for validation.
        **common: arguments of :class:`ImageDataModule`; ``root`` is accepted and ignored.
    """

    def __init__(self, *, val_size: int | float = 300, **common: Any) -> None:
        super().__init__(val_size=val_size, **common)

    def load_train(self) -> TensorImages:
        """Return the 1,497 images that are not for testing."""
        return _load(test=False)

    def load_test(self) -> TensorImages:
        """Return the 300 test images."""
        return _load(test=True)


def _load(test: bool) -> TensorImages:
    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target)
    index = stratified_split(labels, TEST_SIZE, seed=0)[int(test)]
    return TensorImages(images[index], labels[index], [str(name) for name in digits.target_names])
