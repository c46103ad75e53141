import pytest
import torch
from torch.nn import functional as F

from lightning_fscreen.data import random_crop, random_horizontal_flip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(count=40, dtype=torch.uint8):
    return torch.randint(1, 256, (count, 3, 6, 9), generator=seeded(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_matches_a_loop_over_images(dtype):
    images, padding = batch(dtype=dtype), 2
    offsets = torch.randint(2 * padding + 1, (2, len(images)), generator=seeded())
    expected = torch.stack(
        [
            F.pad(image, (padding,) * 4)[:, top : top + 6, left : left + 9]
            for image, top, left in zip(images, *offsets.tolist(), strict=True)
        ]
    )
    cropped = random_crop(images, padding, generator=seeded())
    assert cropped.dtype == dtype
    assert cropped.is_contiguous()
    assert torch.equal(cropped, expected)


def test_crop_reaches_every_offset_and_no_other():
    marked = torch.zeros(2000, 1, 5, 5)
    marked[:, :, 2, 2] = 1
    places = {tuple(place[2:]) for place in random_crop(marked, 1, generator=seeded()).nonzero().tolist()}
    assert places == {(y, x) for y in (1, 2, 3) for x in (1, 2, 3)}


def test_crop_without_padding_changes_nothing():
    assert torch.equal(random_crop(batch(), 0), batch())


def test_flip_matches_a_loop_over_images():
    images = batch()
    flipped = torch.rand(len(images), 1, 1, 1, generator=seeded()).flatten() < 0.3
    expected = torch.stack([i.flip(-1) if f else i for i, f in zip(images, flipped, strict=True)])
    assert 0 < flipped.sum() < len(images)
    assert torch.equal(random_horizontal_flip(images, 0.3, generator=seeded()), expected)


def test_flip_with_certainty():
    assert torch.equal(random_horizontal_flip(batch(), 0.0), batch())
    assert torch.equal(random_horizontal_flip(batch(), 1.0), batch().flip(-1))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"padding .* got -1"):
        random_crop(batch(), -1)
    with pytest.raises(ValueError, match=r"p must .* got 1\.5"):
        random_horizontal_flip(batch(), 1.5)
