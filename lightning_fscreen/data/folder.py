"""Any data set laid out as ``ROOT/train/CLASS/*.jpg`` and ``ROOT/test/CLASS/*.jpg``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as tv

from lightning_fscreen.data.datamodule import ImageDataModule
from lightning_fscreen.data.images import Batch, ImageSet, TensorImages


class ImageFolderDataModule(ImageDataModule):
    """Images in ``ROOT/train/CLASS/`` and ``ROOT/test/CLASS/``, in any format that torchvision's ``ImageFolder`` lists.

    They are decoded once and kept in memory if they fit, otherwise for every batch, and then normalised with the
    statistics of an evenly spaced sample of 1,000 training images.

    Args:
        image_size: side in pixels; images are resized to it along their shorter side and cropped about the centre. None
            takes them as they are, and all must have the same size.
        in_memory: whether to keep the decoded images in memory; None decides by ``max_memory_gb``, and keeps them for
            ``on_device``.
        max_memory_gb: largest size of all decoded images, training and test, for which None says yes; in 10⁹ bytes.
        grayscale: whether to read one grey channel instead of three.
        val_size: number or fraction of the training images set aside for validation.
        **common: arguments of :class:`ImageDataModule`.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self,
        *,
        image_size: int | None = None,
        in_memory: bool | None = None,
        max_memory_gb: float = 2.0,
        grayscale: bool = False,
        val_size: int | float = 0.1,
        **common: Any,
    ) -> None:
        super().__init__(val_size=val_size, **common)
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, or null for images of one size, got {image_size}")
        if max_memory_gb < 0:
            raise ValueError(f"max_memory_gb must not be negative, got {max_memory_gb}")
        if self.on_device and in_memory is False:
            raise ValueError("on_device=True needs images that are held in memory, got in_memory=False: leave it out")
        self.image_size = image_size
        self.in_memory = True if self.on_device else in_memory
        self.max_memory_gb = max_memory_gb
        self.grayscale = grayscale

    def load_train(self) -> ImageSet:
        """List both folders, and read the training images if they are to stay in memory.

        Raises:
            FileNotFoundError: if a folder is missing or empty.
            ValueError: if the folders have different classes, or, without ``image_size``, two images different sizes.
            RuntimeError: if an image cannot be read.
        """
        train, test = self._list("train"), self._list("test")
        if train.classes != test.classes:
            only_train = sorted(set(train.classes) - set(test.classes))
            only_test = sorted(set(test.classes) - set(train.classes))
            raise ValueError(
                f"{self.root.absolute()}: train/ and test/ must have the same class folders, "
                f"but only train/ has {only_train} and only test/ has {only_test}"
            )
        files = ImageFiles(train.samples, train.classes, self.image_size, self.grayscale)
        if self.in_memory is None:
            size = (len(train) + len(test)) * math.prod(files.shape)
            self.in_memory = size <= self.max_memory_gb * 1e9
        return files.decode_all() if self.in_memory else files

    def load_test(self) -> ImageSet:
        """Read the test images like :meth:`load_train`; without ``image_size``, all must have the same size."""
        test = self._list("test")
        files = ImageFiles(test.samples, test.classes, self.image_size, self.grayscale, self.image_shape)
        return files.decode_all() if self.in_memory else files

    def _list(self, part: str) -> ImageFolder:
        folder = self.root.absolute() / part
        layout = "set data.root=ROOT to a folder of ROOT/train/CLASS/*.jpg and ROOT/test/CLASS/*.jpg"
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}: {layout}")
        try:
            return ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder}: {error}. Put images there, or {layout}") from error


class ImageFiles(ImageSet):
    """Images decoded from their files whenever a batch asks for them.

    Args:
        samples: path and class index of each image.
        classes: names of the classes.
        image_size: side in pixels to resize and crop to, or None.
        grayscale: whether to read one channel instead of three.
        shape: (C, H, W) that every image must have; that of the first image by default.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        classes: Sequence[str],
        image_size: int | None = None,
        grayscale: bool = False,
        shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__(torch.tensor([label for _, label in samples]), classes)
        self.paths = [path for path, _ in samples]
        self.image_size = image_size
        self.grayscale = grayscale
        self.shape = tuple(self._decode(self.paths[0]).shape) if shape is None else shape

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """Return images (B, C, H, W), uint8, and their labels (B,), int64.

        Raises:
            RuntimeError: if an image cannot be read.
            ValueError: if an image has another size than the others.
        """
        index = torch.as_tensor(indices)
        # Filled in place: a list of images and its stack would take twice the memory of a whole data set.
        images = torch.empty((len(index), *self.shape), dtype=torch.uint8)
        for row, path in zip(images, (self.paths[i] for i in index.tolist()), strict=True):
            image = self._decode(path)
            if image.shape != row.shape:
                raise ValueError(
                    f"{path} is {image.shape[2]} × {image.shape[1]} pixels, where other images are "
                    f"{self.shape[2]} × {self.shape[1]}: pass data.image_size=PIXELS to resize them all"
                )
            row.copy_(image)
        return images, self.labels[index]

    def decode_all(self) -> TensorImages:
        """Return the same images, held in memory."""
        return TensorImages(*self.__getitems__(torch.arange(len(self))), self.classes)

    def _decode(self, path: str) -> Tensor:
        try:
            with Image.open(path) as file:
                image = file.convert("L" if self.grayscale else "RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise RuntimeError(f"{path} cannot be read as an image ({error}): replace or delete it") from error
        if self.image_size is not None:
            image = tv.center_crop(tv.resize(image, self.image_size), [self.image_size, self.image_size])
        pixels: Tensor = tv.pil_to_tensor(image)
        return pixels
