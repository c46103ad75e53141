"""Labelled images that a DataLoader fetches a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

Batch = tuple[Tensor, Tensor]


class ImageSet(Dataset[Batch]):
    """Images of one shape with their labels; subclasses say where the pixels come from.

    torch's ``DataLoader`` hands the indices of a whole batch to ``__getitems__``, which returns it already stacked;
    ``collate_fn`` is therefore :func:`identity`.

    Args:
        labels: class indices (N,), any integer dtype; kept as int64.
        classes: names of the classes, in the order of their indices; "0", "1", … up to the largest label by default.

    Raises:
        ValueError: if there are no labels, or one lies outside ``classes``.
    """

    def __init__(self, labels: Tensor, classes: Sequence[str] | None = None) -> None:
        if len(labels) == 0:
            raise ValueError("an image set needs at least one image, got none")
        self.labels = labels.long()
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        self.classes = [str(label) for label in range(highest + 1)] if classes is None else list(classes)
        if lowest < 0 or highest >= len(self.classes):
            raise ValueError(f"labels must lie in 0..{len(self.classes) - 1}, got {lowest}..{highest}")

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        """Return an image (C, H, W), uint8, and its label (), int64."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """Return images (B, C, H, W), uint8, and their labels (B,), int64."""
        raise NotImplementedError

    def move(self, device: torch.device) -> None:
        """Hold them on a device; batches are there, too.

        Raises:
            ValueError: if they are not held in memory.
        """
        raise ValueError("on_device=True needs images that are held in memory: set in_memory=true as well")


class TensorImages(ImageSet):
    """Images held in memory.

    Args:
        images: pixels (N, C, H, W), uint8.
        labels: class indices (N,).
        classes: names of the classes.

    Raises:
        ValueError: if ``images`` has another shape or dtype, or another number of images than ``labels``.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[str] | None = None) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images must be uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{len(images)} images need as many labels, got labels of shape {tuple(labels.shape)}")
        super().__init__(labels, classes)
        self.images = images

    def move(self, device: torch.device) -> None:
        """Hold them on a device."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """Return images (B, C, H, W), uint8, and their labels (B,), int64."""
        index = torch.as_tensor(indices)
        return self.images[index], self.labels[index]


def identity(batch: Any) -> Any:
    """Return a batch as it is, being collated already: the ``collate_fn`` of an :class:`ImageSet`."""
    return batch
