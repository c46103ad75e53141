"""Augmentation of whole batches, with randomness of its own for every image, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def random_crop(images: Tensor, padding: int, generator: torch.Generator | None = None) -> Tensor:
    r"""Shift every image by its own random offset, filling with zeros.

    ``out[n, :, y, x] = padded[n, :, top_n + y, left_n + x]`` with ``top_n, left_n`` uniform on ``{0, …, 2 · padding}``:
    what torchvision's ``RandomCrop(size, padding)`` does to one image at its own size.

    Args:
        images: (N, C, H, W), any dtype.
        padding: zeros added on each side before cropping, in pixels; 0 returns the images as they are.
        generator: on the device of ``images``; the device's global one by default.

    Returns:
        The crops (N, C, H, W).

    Raises:
        ValueError: if ``padding`` is negative.
    """
    if padding < 0:
        raise ValueError(f"padding must be at least 0 pixels, got {padding}")
    if padding == 0:
        return images
    count, _, height, width = images.shape
    offsets = torch.randint(2 * padding + 1, (2, count), generator=generator, device=images.device)
    # Every possible crop, as a view: (N, C, 2p + 1, 2p + 1, H, W). Only the chosen ones are copied.
    crops = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return crops[torch.arange(count, device=images.device), :, offsets[0], offsets[1]]


def random_horizontal_flip(images: Tensor, p: float = 0.5, generator: torch.Generator | None = None) -> Tensor:
    """Mirror every image left to right with probability ``p``, independently of the others.

    Args:
        images: (N, C, H, W), any dtype.
        p: probability of a flip, in [0, 1].
        generator: on the device of ``images``; the device's global one by default.

    Returns:
        The images (N, C, H, W), some of them flipped.

    Raises:
        ValueError: if ``p`` lies outside [0, 1].
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must lie in [0, 1], got {p}")
    flipped = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < p
    return torch.where(flipped, images.flip(-1), images)
