import hashlib
import pickle
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from lightning_fscreen.cli.filling import fit_to_data
from lightning_fscreen.data import CIFAR10DataModule, cifar

NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
# Five files of 20 images for training, one for testing; channels before rows before columns.
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 20, 3, 32, 32), dtype=np.uint8)
LABELS = (np.arange(20) % 10).tolist()
TRAIN = torch.from_numpy(PIXELS[:5].reshape(100, 3, 32, 32))


@pytest.fixture
def root(tmp_path, monkeypatch):
    folder = tmp_path / cifar.FOLDER
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        # torchvision still compares checksums: those of these files.
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    files = [
        [name, write(name, {"data": pixels.reshape(20, -1), "labels": LABELS})]
        for name, pixels in zip(names, PIXELS, strict=True)
    ]
    monkeypatch.setattr(cifar.CIFAR10, "train_list", files[:5])
    monkeypatch.setattr(cifar.CIFAR10, "test_list", files[5:])
    md5 = write("batches.meta", {"label_names": NAMES})
    monkeypatch.setattr(cifar.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})
    return tmp_path


def contents(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def rows(images):
    return {tuple(image) for image in images.flatten(1).tolist()}


def test_reads_the_files(root):
    data = CIFAR10DataModule(root=str(root), val_size=20)
    data.prepare_data()
    data.setup("fit")
    assert (data.num_classes, data.classes, data.image_shape) == (10, NAMES, (3, 32, 32))
    (train, train_labels), (val, val_labels) = contents(data.train_dataloader()), contents(data.val_dataloader())
    assert (train.dtype, len(train), len(val)) == (torch.uint8, 80, 20)
    assert rows(torch.cat([train, val])) == rows(TRAIN)
    assert train_labels.bincount().tolist() == [8] * 10
    assert val_labels.bincount().tolist() == [2] * 10
    test, test_labels = contents(data.test_dataloader())
    assert torch.equal(test, torch.from_numpy(PIXELS[5]))
    assert test_labels.tolist() == LABELS
    assert torch.allclose(data.mean.double(), train.double().mean((0, 2, 3)) / 255)


def test_split_depends_on_its_seed_alone(root):
    def validation(seed):
        return rows(contents(CIFAR10DataModule(root=str(root), val_size=20, split_seed=seed).val_dataloader())[0])

    torch.manual_seed(1)
    first = validation(0)
    torch.manual_seed(2)
    assert validation(0) == first
    assert validation(1) != first


def test_val_size_zero_trains_on_all(root):
    data = CIFAR10DataModule(root=str(root), val_size=0)
    assert rows(contents(data.train_dataloader())[0]) == rows(TRAIN)
    assert data.val_dataloader() == []


def test_defaults_are_the_usual_split_and_augmentation(root):
    data = CIFAR10DataModule(root=str(root))
    assert (data.crop_padding, data.horizontal_flip, data.download) == (4, True, True)
    with pytest.raises(ValueError, match="val_size=5000 leaves none of the 100 training images"):
        data.setup("fit")


def test_missing_files_name_the_folder_and_the_remedy(tmp_path):
    data = CIFAR10DataModule(root=str(tmp_path / "nowhere"), download=False)
    for read in (data.prepare_data, data.setup):
        with pytest.raises(
            FileNotFoundError, match=rf"nowhere/{cifar.FOLDER} lacks files.*data\.root=.*data\.download=true"
        ):
            read()


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("length", [None, 0, 100])
def test_missing_and_damaged_files_are_refused(root, name, length):
    path = root / cifar.FOLDER / name
    if length is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FileNotFoundError, match=rf"{cifar.FOLDER} lacks files of CIFAR-10, or they are damaged"):
        CIFAR10DataModule(root=str(root), val_size=20, download=False).setup("fit")


def test_failed_download_names_the_folder_and_the_remedy(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise URLError("no route to host")

    monkeypatch.setattr(cifar, "CIFAR10", offline)
    with pytest.raises(RuntimeError, match=rf"no route to host.*{cifar.FOLDER} there.*data\.root="):
        CIFAR10DataModule(root=str(tmp_path)).prepare_data()


@pytest.mark.parametrize("model", ["resnet20", "resnet164", "densenet40", "vgg16_bn"])
def test_configurations_fit_the_data(root, model):
    with initialize_config_module("lightning_fscreen.conf", version_base="1.3"):
        config = compose(
            "train",
            overrides=["experiment=none", "data=cifar10", f"model={model}", f"data.root={root}", "data.val_size=20"],
        )
    data = instantiate(config.data, _convert_="all")
    assert isinstance(data, CIFAR10DataModule)
    assert (data.crop_padding, data.horizontal_flip, data.val_size) == (4, True, 20)
    data.setup("fit")
    fit_to_data(config, data)
    classifier = instantiate(config.model, _convert_="all")
    images, _ = next(iter(data.val_dataloader()))
    assert classifier(data.normalize(images[:2])).shape == (2, 10)
    optimizer = classifier.optimizer(classifier.parameters())
    assert {key: optimizer.defaults[key] for key in ("lr", "momentum", "nesterov")} == {
        "lr": 0.1, "momentum": 0.9, "nesterov": True,
    }  # fmt: skip
