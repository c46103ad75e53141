import struct
from urllib.error import URLError

import numpy as np
import pytest
import torch

from lightning_fscreen.data import MNISTDataModule, mnist

PIXELS = np.random.default_rng(0).integers(0, 256, (50, 28, 28), dtype=np.uint8)
LABELS = (np.arange(50) % 10).astype(np.uint8)


def write_idx(path, array):
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def root(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    write_idx(raw / "train-images-idx3-ubyte", PIXELS)
    write_idx(raw / "train-labels-idx1-ubyte", LABELS)
    write_idx(raw / "t10k-images-idx3-ubyte", PIXELS[:20])
    write_idx(raw / "t10k-labels-idx1-ubyte", LABELS[:20])
    return tmp_path


def all_images(loader):
    return torch.cat([images for images, _ in loader]).squeeze(1).numpy()


def test_last_training_images_are_for_validation(root):
    data = MNISTDataModule(root=str(root), val_size=15, split_seed=3)
    data.prepare_data()
    data.setup("fit")
    assert (data.num_classes, data.image_shape) == (10, (1, 28, 28))
    assert np.array_equal(all_images(data.val_dataloader()), PIXELS[35:])
    assert len(all_images(data.train_dataloader())) == 35
    assert np.array_equal(all_images(data.test_dataloader()), PIXELS[:20])
    assert data.mean.item() == pytest.approx(PIXELS[:35].mean() / 255)
    (_, labels), *_ = data.val_dataloader()
    assert labels.tolist() == LABELS[35:].tolist()


def test_val_size_zero_trains_on_all(root):
    assert len(all_images(MNISTDataModule(root=str(root), val_size=0).train_dataloader())) == 50


def test_default_validation_needs_the_whole_data_set(root):
    with pytest.raises(ValueError, match="val_size=10000 leaves none of the 50 training images"):
        MNISTDataModule(root=str(root)).setup("fit")


def test_missing_files_name_the_folder_and_the_remedy(tmp_path):
    data = MNISTDataModule(root=str(tmp_path / "nowhere"), download=False)
    for read in (data.prepare_data, data.setup):
        with pytest.raises(
            FileNotFoundError, match=r"nowhere/MNIST/raw has no train-images.*data\.root=.*data\.download=true"
        ):
            read()


def test_a_fit_reads_no_test_image(root):
    (root / "MNIST/raw/t10k-images-idx3-ubyte").write_bytes(b"damaged")
    data = MNISTDataModule(root=str(root), val_size=15)
    data.setup("fit")
    with pytest.raises(RuntimeError, match=r"t10k-images-idx3-ubyte or t10k-labels-idx1-ubyte in .* is damaged"):
        data.setup("test")


def test_failed_download_names_the_expected_files(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise URLError("no route to host")

    monkeypatch.setattr(mnist, "MNIST", offline)
    with pytest.raises(RuntimeError, match=r"no route to host.*train-images-idx3-ubyte.*data\.root="):
        MNISTDataModule(root=str(tmp_path)).prepare_data()


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize("length", [0, 3, 12, 40])
def test_truncated_file_is_named(root, name, length):
    path = root / "MNIST/raw" / name
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(RuntimeError, match=rf"{name}.* is damaged.*data\.download=true.*data\.root="):
        MNISTDataModule(root=str(root), val_size=0).setup("fit")


@pytest.mark.parametrize("labels", [LABELS[:49], LABELS + 1, PIXELS])
def test_labels_that_do_not_fit_are_refused(root, labels):
    write_idx(root / "MNIST/raw/train-labels-idx1-ubyte", labels)
    with pytest.raises(RuntimeError, match=r"train-labels-idx1-ubyte in .*MNIST/raw is damaged"):
        MNISTDataModule(root=str(root), val_size=0).setup("fit")
