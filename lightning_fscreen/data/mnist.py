"""MNIST (LeCun et al., 1998), through torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets import MNIST

from lightning_fscreen.data.datamodule import ImageDataModule
from lightning_fscreen.data.images import TensorImages

CONTENTS = ("images-idx3-ubyte", "labels-idx1-ubyte")
FILES = [f"{part}-{content}" for part in ("train", "t10k") for content in CONTENTS]


class MNISTDataModule(ImageDataModule):
    """MNIST, 1 × 28 × 28: by default 50,000 images to train on, 10,000 for validation and 10,000 for testing.

    Args:
        download: whether ``prepare_data`` may download what is missing to ``root/MNIST/raw``.
        val_size: number or fraction of the training images, the last ones, set aside for validation; 0 trains on all
            60,000. ``split_seed`` plays no part.
        **common: arguments of :class:`ImageDataModule`.
    """

    def __init__(self, *, download: bool = True, val_size: int | float = 10_000, **common: Any) -> None:
        super().__init__(val_size=val_size, **common)
        self.download = download

    @property
    def folder(self) -> Path:
        """Folder of the four files."""
        return self.root / "MNIST" / "raw"

    def prepare_data(self) -> None:
        """Download the files, unless they are there already.

        Raises:
            FileNotFoundError: if they are missing and ``download`` is false.
            RuntimeError: if the download fails.
        """
        if self.download and self._missing():
            try:
                MNIST(str(self.root), download=True)
            except (RuntimeError, OSError) as error:
                raise RuntimeError(
                    f"MNIST could not be downloaded to {self.folder.absolute()} ({error}). Without a connection, put "
                    f"the files {', '.join(FILES)} there, or set data.root=FOLDER to where FOLDER/MNIST/raw has them"
                ) from error
        self._require_files()

    def load_train(self) -> TensorImages:
        """Read the 60,000 training images.

        Raises:
            FileNotFoundError: if a file of the data set is missing.
            RuntimeError: if a file is damaged.
        """
        return self._load("train")

    def load_test(self) -> TensorImages:
        """Read the 10,000 test images; raises like :meth:`load_train`."""
        return self._load("t10k")

    def split(self, labels: Tensor, val_size: int) -> tuple[Tensor, Tensor]:
        """Set the last ``val_size`` images aside."""
        index = torch.arange(len(labels))
        return index[: len(labels) - val_size], index[len(labels) - val_size :]

    def _load(self, part: str) -> TensorImages:
        self._require_files()
        try:
            source = MNIST(str(self.root), train=part == "train", download=False)
            return TensorImages(source.data.unsqueeze(1), source.targets, [str(digit) for digit in range(10)])
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:  # what reading a broken file ends in
            names = " or ".join(f"{part}-{content}" for content in CONTENTS)
            raise RuntimeError(
                f"{names} in {self.folder.absolute()} is damaged ({type(error).__name__}: {error}): delete both "
                "and run again with data.download=true, or set data.root=FOLDER to an intact copy"
            ) from error

    def _missing(self) -> list[str]:
        return [name for name in FILES if not (self.folder / name).is_file()]

    def _require_files(self) -> None:
        missing = self._missing()
        if missing:
            raise FileNotFoundError(
                f"{self.folder.absolute()} has no {', '.join(missing)}: set data.root=FOLDER to "
                "where FOLDER/MNIST/raw has the files of MNIST, or data.download=true to download them"
            )
