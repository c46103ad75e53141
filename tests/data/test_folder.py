import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tv

from lightning_fscreen.data import ImageFolderDataModule


def write(path, size=(10, 8), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path):
    for part, count in (("train", 10), ("test", 3)):
        for name in ("cat", "dog"):
            for i in range(count):
                write(tmp_path / part / name / f"{i}.jpg", seed=100 * count + 10 * len(part) + i)
    return tmp_path


def module(root, **arguments):
    return ImageFolderDataModule(root=str(root), **{"val_size": 4} | arguments)


def test_reads_the_layout(root):
    data = module(root)
    data.setup()
    assert data.in_memory is True
    assert (data.num_classes, data.classes, data.image_shape) == (2, ["cat", "dog"], (3, 8, 10))
    parts = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [torch.cat([labels for _, labels in part]).bincount().tolist() for part in parts] == [[8, 8], [2, 2], [3, 3]]
    ((images, _),) = data.test_dataloader()
    assert torch.equal(images[3], tv.pil_to_tensor(Image.open(root / "test/dog/0.jpg")))


@pytest.mark.parametrize("arguments", [{}, {"image_size": 6}, {"image_size": 12, "grayscale": True}])
def test_lazy_reading_gives_the_same_batches(root, arguments):
    eager = module(root, in_memory=True, **arguments)
    lazy = module(root, max_memory_gb=1e-6, **arguments)
    for one, other in (
        (eager.val_dataloader(), lazy.val_dataloader()),
        (eager.test_dataloader(), lazy.test_dataloader()),
    ):
        for (images, labels), (others, other_labels) in zip(one, other, strict=True):
            assert torch.equal(images, others)
            assert torch.equal(labels, other_labels)
    assert lazy.in_memory is False
    assert torch.equal(eager.mean, lazy.mean)
    assert torch.equal(eager.std, lazy.std)
    assert eager.image_shape == lazy.image_shape


def test_images_for_the_device_stay_in_memory(root):
    assert module(root, on_device=True, max_memory_gb=0.0).in_memory is True
    with pytest.raises(ValueError, match="on_device=True needs images that are held in memory, got in_memory=False"):
        module(root, on_device=True, in_memory=False)


def test_image_size_resizes_and_crops_about_the_centre(root):
    write(root / "test/cat/0.jpg", size=(30, 20))
    data = module(root, image_size=6)
    (images, _), *_ = data.test_dataloader()
    image = Image.open(root / "test/cat/0.jpg")
    assert torch.equal(images[0], tv.pil_to_tensor(tv.center_crop(tv.resize(image, 6), [6, 6])))
    assert data.image_shape == (3, 6, 6)


def test_grayscale_has_one_channel(root):
    data = module(root, grayscale=True)
    data.setup("fit")
    assert data.image_shape == (1, 8, 10)
    assert data.mean.shape == (1,)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("part", ["train", "test"])
def test_differing_size_names_the_file_and_the_remedy(root, part, in_memory):
    write(root / part / "dog" / "2.jpg", size=(9, 8))
    data = module(root, in_memory=in_memory, val_size=0)
    with pytest.raises(ValueError, match=rf"{part}/dog/2.jpg is 9 × 8 .* 10 × 8: pass data\.image_size="):
        list(data.train_dataloader())
        list(data.test_dataloader())


def test_unreadable_image_is_named(root):
    path = root / "train/cat/3.jpg"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RuntimeError, match=r"train/cat/3\.jpg cannot be read"):
        module(root).setup("fit")
    (root / "train/cat/0.jpg").write_bytes(b"no image")
    with pytest.raises(RuntimeError, match=r"train/cat/0\.jpg cannot be read"):
        module(root).setup("fit")


@pytest.mark.parametrize("part", ["train", "test"])
def test_missing_and_empty_folders_are_named(root, part):
    for path in (root / part / "dog").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{part}: .*dog.*data\.root="):
        module(root).setup("fit")
    shutil.rmtree(root / part)
    (root / part).mkdir()
    with pytest.raises(FileNotFoundError, match=rf"{part}: .*data\.root="):
        module(root).setup("fit")
    (root / part).rmdir()
    with pytest.raises(FileNotFoundError, match=rf"no folder .*{part}: set data\.root="):
        module(root).setup("fit")


def test_differing_classes_are_named(root):
    write(root / "test/fox/0.jpg")
    with pytest.raises(ValueError, match=r"only train/ has \[\] and only test/ has \['fox'\]"):
        module(root).setup("fit")


@pytest.mark.parametrize(("name", "value"), [("image_size", 0), ("max_memory_gb", -1)])
def test_arguments_are_checked(root, name, value):
    with pytest.raises(ValueError, match=f"{name} .*{value}"):
        module(root, **{name: value})
