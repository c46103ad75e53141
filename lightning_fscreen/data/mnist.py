"""MNIST (LeCun et al., 1998), read from its original files."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
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
        """Folder of the four files, uncompressed or as ``.gz``."""
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
        images, labels = (self._read(f"{part}-{content}") for content in CONTENTS)
        try:
            return TensorImages(images.unsqueeze(1), labels, [str(digit) for digit in range(10)])
        except ValueError as error:
            raise RuntimeError(self._damaged(f"{part}-{CONTENTS[1]}", error)) from error

    def _read(self, name: str) -> Tensor:
        try:
            return _read_idx(self._find(name) or self.folder / name)
        except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise RuntimeError(self._damaged(name, error)) from error

    def _find(self, name: str) -> Path | None:
        """Path of a file, uncompressed or not, if it is there."""
        return next((path for path in (self.folder / name, self.folder / f"{name}.gz") if path.is_file()), None)

    def _damaged(self, name: str, error: Exception) -> str:
        path = (self._find(name) or self.folder / name).absolute()
        return (
            f"{path} is damaged or not a file of MNIST ({error}): "
            "delete it and run again with data.download=true, or set data.root=FOLDER to an intact copy"
        )

    def _missing(self) -> list[str]:
        return [name for name in FILES if self._find(name) is None]

    def _require_files(self) -> None:
        missing = self._missing()
        if missing:
            raise FileNotFoundError(
                f"{self.folder.absolute()} has no {', '.join(missing)}, with or without .gz: set data.root=FOLDER to "
                "where FOLDER/MNIST/raw has the files of MNIST, or data.download=true to download them"
            )


def _read_idx(path: Path) -> Tensor:
    """Read an array of bytes in the IDX format: 0, 0, 8, ndim, then ndim big-endian sizes, then the values.

    Raises:
        ValueError: if the header is not that, or the number of values not what it says.
    """
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError("it does not begin like an IDX file of bytes")
    start = 4 + 4 * content[3]
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ValueError(f"it holds {len(content) - start:,} bytes of data, not the {math.prod(shape):,} of its header")
    # A bytearray, because torch warns of memory that it must not write to.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)
