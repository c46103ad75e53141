"""MNIST with columns of noise: a task with many irrelevant inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fscreen.data.features import FeatureDataModule, FeatureSet
from lightning_fscreen.data.mnist import MNISTDataModule


class NoisyMNISTDataModule(FeatureDataModule):
    """A few of MNIST's images, flattened, with columns of standard normal noise appended: 1 × 1 × (784 + columns).

    Pixels are standardised with one mean and one standard deviation, those of the training images. The images, the
    noise and its columns are the same for the same ``split_seed``.

    Args:
        train_size: number of training images, drawn at random from those that are not for validation.
        noise_columns: number of columns of noise.
        download: whether ``prepare_data`` may download what is missing to ``root/MNIST/raw``.
        val_size: number of the last training images of MNIST set aside for validation.
        **common: arguments of :class:`FeatureDataModule`.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self,
        *,
        train_size: int = 1000,
        noise_columns: int = 2000,
        download: bool = True,
        val_size: int = 10_000,
        **common: Any,
    ) -> None:
        super().__init__(val_size=val_size, standardize=False, **common)
        if train_size < 1:
            raise ValueError(f"train_size must be at least 1, got {train_size}")
        if noise_columns < 0:
            raise ValueError(f"noise_columns must not be negative, got {noise_columns}")
        self.train_size = train_size
        self.noise_columns = noise_columns
        self._source = MNISTDataModule(root=str(self.root), download=download, val_size=val_size)

    def prepare_data(self) -> None:
        """Download MNIST, unless it is there already; raises like :class:`MNISTDataModule`."""
        self._source.prepare_data()

    def load_train(self) -> FeatureSet:
        """Draw the training images, and put those for validation behind them.

        Raises:
            ValueError: if there are not so many images.
            FileNotFoundError, RuntimeError: like :class:`MNISTDataModule`.
        """
        images = self._source.load_train()
        generator = self._generator(0)
        first = len(images) - int(self.val_size)
        if self.train_size > first:
            raise ValueError(
                f"train_size={self.train_size} and val_size={self.val_size} are more than the {len(images)} training "
                "images of MNIST; lower one of them"
            )
        drawn = torch.randperm(first, generator=generator)[: self.train_size]
        index = torch.cat([drawn, torch.arange(first, len(images))])
        pixels, labels = images.__getitems__(index)
        scaled = pixels[: self.train_size].double() / 255
        self._pixels = float(scaled.mean()), float(scaled.std(correction=0))
        return self._with_noise(pixels, labels, generator)

    def load_test(self) -> FeatureSet:
        """Read the 10,000 test images; raises like :class:`MNISTDataModule`."""
        images = self._source.load_test()
        return self._with_noise(images.images, images.labels, self._generator(1))

    def split(self, labels: Tensor, val_size: int) -> tuple[Tensor, Tensor]:
        """Set the last ``val_size`` images aside."""
        return self._source.split(labels, val_size)

    def _generator(self, part: int) -> torch.Generator:
        return torch.Generator().manual_seed(2 * self.split_seed + part)

    def _with_noise(self, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> FeatureSet:
        mean, std = self._pixels
        features = (pixels.flatten(1).float() / 255 - mean) / std
        noise = torch.randn(len(features), self.noise_columns, generator=generator)
        return FeatureSet(torch.cat([features, noise], dim=1), labels, [str(digit) for digit in range(10)])
