"""Labelled feature vectors, as data modules like those for images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_fscreen.data.datamodule import ImageDataModule
from lightning_fscreen.data.images import Batch, ImageSet


class FeatureSet(ImageSet):
    """Feature vectors held in memory, as images (1, 1, p).

    Args:
        features: (N, p), float32.
        labels: class indices (N,).
        classes: names of the classes.

    Raises:
        ValueError: if ``features`` has another shape or dtype, or another number of rows than ``labels``.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: Sequence[str] | None = None) -> None:
        if features.dtype != torch.float32 or features.ndim != 2:
            raise ValueError(f"features must be float32 (N, p), got {features.dtype} {tuple(features.shape)}")
        if len(labels) != len(features):
            raise ValueError(f"{len(features)} rows of features need as many labels, got {len(labels)}")
        super().__init__(labels, classes)
        self.features = features.view(len(features), 1, 1, -1)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """Return features (B, 1, 1, p), float32, and their labels (B,), int64."""
        index = torch.as_tensor(indices)
        return self.features[index], self.labels[index]

    def move(self, device: torch.device) -> None:
        """Hold them on a device."""
        self.features, self.labels = self.features.to(device), self.labels.to(device)


class FeatureDataModule(ImageDataModule):
    """Base of the data modules that hold feature vectors; arguments that only images have are refused.

    Args:
        standardize: whether to shift and scale every feature to mean 0 and standard deviation 1 over the training part;
            otherwise features stay as :meth:`load_train` returned them.
        **common: arguments of :class:`ImageDataModule`.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(self, *, standardize: bool = True, **common: Any) -> None:
        super().__init__(**common)
        if self.crop_padding or self.horizontal_flip:
            raise ValueError(
                f"{type(self).__name__} has feature vectors, which cannot be cropped or flipped: set crop_padding=0 "
                "and horizontal_flip=False"
            )
        self.standardize = standardize

    def normalize(self, images: Tensor) -> Tensor:
        """Return standardised features, float32, of the shape given."""
        if self._scale.device != images.device:
            self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        return images * self._scale + self._shift

    def _fit_normalization(self, images: Dataset[Batch], train: Tensor) -> None:
        assert isinstance(images, FeatureSet)
        features = images.features[train].double()
        self.image_shape = (1, 1, features.shape[-1])
        self.mean, self.std = torch.zeros(1), torch.ones(1)
        self._scale, self._shift = torch.ones(()), torch.zeros(())
        if self.standardize:
            mean = features.mean(0)
            std = features.std(0, correction=0)
            std[std <= 1e-12 * mean.abs()] = 1  # a constant feature
            self._scale, self._shift = (1 / std).float(), (-mean / std).float()
