"""The base of all image data modules: the split, the normalisation, the loaders, the augmentation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from lightning_fscreen.data.augment import random_crop, random_horizontal_flip
from lightning_fscreen.data.images import Batch, ImageSet, TensorImages, identity

STATISTICS_SAMPLE = 1000


class ImageDataModule(LightningDataModule):
    """Base of the image data modules: batches of normalised float32 images (N, C, H, W) and int64 labels (N,).

    Pixels stay uint8 until they are on the device, where they become ``(x / 255 - mean) / std`` with the mean and the
    standard deviation of each channel over the training part. While training, they are cropped and flipped first.
    The loaders themselves yield uint8; :meth:`normalize` makes the network's inputs of it.

    A subclass implements :meth:`load_train` and :meth:`load_test`. Test images are read only by ``setup("test")``,
    ``setup(None)`` or :meth:`test_dataloader`, never for a fit.

    Args:
        root: folder of the data set.
        batch_size: images per training batch (on each device).
        eval_batch_size: images per validation or test batch.
        val_size: number (int) or fraction (float) of the training images set aside for validation; 0 trains on all of
            them, without validation.
        split_seed: seed of that split.
        crop_padding: pixels of zero padding of the random crop; 0 does not crop.
        horizontal_flip: whether to flip training images with probability ½.
        num_workers: processes that load batches. Images held in memory need none.
        pin_memory: whether to copy batches to pinned memory, for a faster transfer to a GPU.
        on_device: whether to keep all images on the Trainer's device, as bytes; order, crops and flips stay the same.

    Attributes:
        num_classes: number of classes, after ``setup`` like those below.
        classes: their names.
        image_shape: (C, H, W).
        mean: mean of each channel (C,), float32, of pixels scaled to [0, 1].
        std: standard deviation of each channel (C,), float32; 1 for a channel that is constant.

    Raises:
        ValueError: for an argument outside its range.
    """

    num_classes: int
    classes: list[str]
    image_shape: tuple[int, int, int]
    mean: Tensor
    std: Tensor
    _scale: Tensor
    _shift: Tensor

    def __init__(
        self,
        *,
        root: str = "data",
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        val_size: int | float = 0.1,
        split_seed: int = 0,
        crop_padding: int = 0,
        horizontal_flip: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        on_device: bool = False,
    ) -> None:
        super().__init__()
        _check_count("batch_size", batch_size, 1)
        _check_count("eval_batch_size", eval_batch_size, 1)
        _check_count("crop_padding", crop_padding, 0)
        _check_count("num_workers", num_workers, 0)
        if val_size < 0 or (isinstance(val_size, float) and val_size >= 1):
            raise ValueError(f"val_size must be a number of images (int) or a fraction below 1 (float), got {val_size}")
        if on_device and (num_workers or pin_memory):
            raise ValueError(
                f"on_device=True needs neither num_workers nor pin_memory, got {num_workers} and {pin_memory}: set "
                "them to 0 and false"
            )
        self.root = Path(root).expanduser()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_size = val_size
        self.split_seed = split_seed
        self.crop_padding = crop_padding
        self.horizontal_flip = horizontal_flip
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.on_device = on_device
        self._train: Dataset[Batch] | None = None
        self._val: Dataset[Batch] | None = None
        self._test: ImageSet | None = None

    def load_train(self) -> ImageSet:
        """Read the training images, those for validation included."""
        raise NotImplementedError

    def load_test(self) -> ImageSet:
        """Read the test images; called after :meth:`load_train`."""
        raise NotImplementedError

    def split(self, labels: Tensor, val_size: int) -> tuple[Tensor, Tensor]:
        """Return the indices of the training and the validation images; stratified unless a subclass fixes them.

        Args:
            labels: classes (N,) of the images that :meth:`load_train` returned.
            val_size: number of images to set aside, below N.
        """
        return stratified_split(labels, val_size, self.split_seed)

    def setup(self, stage: str | None = None) -> None:
        """Read the images that the stage needs, unless they have been read already.

        Every stage needs the training images, as they define the normalisation; "test" and None the test images, too.

        Raises:
            ValueError: if ``val_size`` leaves no image to train on.
        """
        if self._train is None:
            images = self.load_train()
            train, val = self.split(images.labels, self._val_count(len(images)))
            self.classes = images.classes
            self.num_classes = len(images.classes)
            self._fit_normalization(images, train)
            self._val = Subset(images, val.tolist()) if len(val) else None
            self._train = Subset(images, train.tolist())
        if self._test is None and stage in (None, "test"):
            self._test = self.load_test()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return shuffled batches of the training part.

        In a Trainer, after ``seed_everything``, their order is a function of (seed, epoch), so that a resumed training
        sees what the uninterrupted one would have; otherwise torch's global random numbers decide.
        """
        self.setup("fit")
        assert self._train is not None
        trainer, seed = self.trainer, os.environ.get("PL_GLOBAL_SEED")
        if trainer is None or seed is None:
            return self._loader(self._train, self.batch_size, shuffle=True)
        sampler: DistributedSampler[Batch] = DistributedSampler(
            self._train, trainer.world_size, trainer.global_rank, seed=int(seed)
        )
        # Lightning sets the epoch, too, but only after workers have asked for the first indices.
        sampler.set_epoch(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        # A generator of its own: making an iterator draws a number, more often in a training that is not resumed.
        own = torch.Generator().manual_seed(int(seed))
        return self._loader(self._train, self.batch_size, sampler=sampler, generator=own)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return batches of the validation part in order, or no loader at all if there is none."""
        self.setup("validate")
        return [] if self._val is None else self._loader(self._val, self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return batches of the test set in order, reading it if need be."""
        self.setup("test")
        assert self._test is not None
        return self._loader(self._test, self.eval_batch_size)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment, only while training, and normalise a batch on its device."""
        images, labels = batch
        trainer = self.trainer
        if trainer is not None and trainer.training:
            # Before normalisation, like torchvision's pipelines: the padding of a crop is black.
            images = random_crop(images, self.crop_padding)
            if self.horizontal_flip:
                images = random_horizontal_flip(images)
        images = self.normalize(images)
        if trainer is not None:
            # Lightning casts to the precision of "bf16-true" and the like before this hook, while pixels are integers.
            images = trainer.precision_plugin.convert_input(images)
        return images, labels

    def normalize(self, images: Tensor) -> Tensor:
        """Return ``(x / 255 - mean) / std``.

        Args:
            images: pixels (N, C, H, W), uint8, on any device.

        Returns:
            The normalised images (N, C, H, W), float32.
        """
        if self._scale.device != images.device:
            self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        return images.to(torch.float32).mul_(self._scale).add_(self._shift)

    def _val_count(self, total: int) -> int:
        count = self.val_size
        if isinstance(count, float):
            count = max(1, round(count * total)) if count else 0
        if count >= total:
            raise ValueError(f"val_size={self.val_size} leaves none of the {total} training images: use a smaller one")
        return count

    def _fit_normalization(self, images: ImageSet, train: Tensor) -> None:
        if not isinstance(images, TensorImages):
            # Decoding every file would take as long as an epoch; evenly spaced ones represent every class.
            train = train[torch.linspace(0, len(train) - 1, min(len(train), STATISTICS_SAMPLE)).round().long()]
        pixels, _ = images.__getitems__(train)
        channels, height, width = pixels.shape[1:]
        self.image_shape = (channels, height, width)
        self.mean, self.std = _channel_statistics(pixels)
        self._scale = (1 / (255 * self.std)).view(-1, 1, 1)
        self._shift = (-self.mean / self.std).view(-1, 1, 1)

    def _loader(self, images: Dataset[Batch], batch_size: int, **order: Any) -> DataLoader[Batch]:
        if self.on_device and self.trainer is not None:
            held = images.dataset if isinstance(images, Subset) else images
            assert isinstance(held, ImageSet)
            held.move(self.trainer.strategy.root_device)
        return DataLoader(
            images,
            batch_size=batch_size,
            **order,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
            collate_fn=identity,
        )


def stratified_split(labels: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Set aside ``size`` of N samples, of each class its share of them to within one.

    Samples in random order, sorted by class, are taken at equal distances (systematic sampling).

    Args:
        labels: classes (N,), integer.
        size: number of samples to set aside, 0 ≤ size ≤ N.
        seed: of the random order.

    Returns:
        The indices of the samples kept (N - size,) and set aside (size,), int64, both ascending.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[torch.argsort(labels[order], stable=True)]
    middles = (2 * torch.arange(size) + 1) * len(labels) // max(2 * size, 1)
    aside = torch.zeros(len(labels), dtype=torch.bool)
    aside[order[middles]] = True
    return (~aside).nonzero().flatten(), aside.nonzero().flatten()


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,), float32, of each channel of uint8 images (N, C, H, W), scaled to [0, 1]."""
    # A histogram of the 256 values is exact and spares a floating-point copy of the whole data set.
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(dim=1)])
    weights = counts.double() / counts.sum(dim=1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = weights @ values
    std = (weights * (values - mean[:, None]) ** 2).sum(dim=1).sqrt()
    # Rounding of the mean leaves a constant channel with a deviation of the order of 1e-17, far below one grey level.
    std[(counts > 0).sum(dim=1) == 1] = 1
    return mean.float(), std.float()


def _check_count(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
