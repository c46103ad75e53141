"""CIFAR-10 (Krizhevsky, 2009), through torchvision."""

from __future__ import annotations

from typing import Any

import torch
from torchvision.datasets import CIFAR10

from lightning_fscreen.data.datamodule import ImageDataModule
from lightning_fscreen.data.images import TensorImages

FOLDER = "cifar-10-batches-py"


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10, 3 × 32 × 32: by default 45,000 images to train on, 5,000 for validation and 10,000 for testing.

    Args:
        download: whether ``prepare_data`` may download what is missing to ``root/cifar-10-batches-py``.
        val_size: number or fraction of the training images set aside for validation; 0 trains on all 50,000.
        crop_padding: pixels of zero padding of the random crop.
        horizontal_flip: whether to flip training images with probability ½.
        **common: arguments of :class:`ImageDataModule`.
    """

    def __init__(
        self,
        *,
        download: bool = True,
        val_size: int | float = 5000,
        crop_padding: int = 4,
        horizontal_flip: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(val_size=val_size, crop_padding=crop_padding, horizontal_flip=horizontal_flip, **common)
        self.download = download

    def prepare_data(self) -> None:
        """Download the files, unless they are there already.

        Raises:
            FileNotFoundError: if they are missing or damaged and ``download`` is false.
            RuntimeError: if the download fails.
        """
        if self.download:
            try:
                CIFAR10(str(self.root), download=True)
            except (RuntimeError, OSError) as error:
                raise RuntimeError(
                    f"CIFAR-10 could not be downloaded to {self.root.absolute()} ({error}). Without a connection, put "
                    f"the folder {FOLDER} there, or set data.root=FOLDER to where it is"
                ) from error
        else:
            self._load(train=True)

    def load_train(self) -> TensorImages:
        """Read the 50,000 training images.

        Raises:
            FileNotFoundError: if a file of the data set is missing or damaged.
        """
        return self._load(train=True)

    def load_test(self) -> TensorImages:
        """Read the 10,000 test images; raises like :meth:`load_train`."""
        return self._load(train=False)

    def _load(self, train: bool) -> TensorImages:
        try:
            source = CIFAR10(str(self.root), train=train, download=False)
        except RuntimeError as error:  # torchvision compares checksums
            raise FileNotFoundError(
                f"{(self.root / FOLDER).absolute()} lacks files of CIFAR-10, or they are damaged: set data.root=FOLDER "
                f"to where FOLDER/{FOLDER} is whole, or data.download=true to download it"
            ) from error
        images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
        return TensorImages(images, torch.tensor(source.targets), source.classes)
