from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.optim import SGD
from torch.utils.data import RandomSampler, SequentialSampler
from torchvision.transforms.functional import normalize

from lightning_fscreen.data import ImageDataModule, TensorImages
from lightning_fscreen.data.datamodule import stratified_split
from lightning_fscreen.models import ImageClassifier, lenet300_100
from tests.pretended import pretended_trainer, pretending


def random_images(count, seed, constant_channel=True):
    images = torch.randint(256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    if constant_channel:
        images[:, 2] = 7
    return TensorImages(images, torch.arange(count) % 5, list("abcde"))


class RandomData(ImageDataModule):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.reads = []

    def load_train(self):
        self.reads.append("train")
        return random_images(100, seed=0)

    def load_test(self):
        self.reads.append("test")
        return random_images(30, seed=1)


class Recorder(ImageClassifier):
    """Keeps the images of every step."""

    def __init__(self):
        super().__init__(lenet300_100(5, 48), partial(SGD, lr=0.1), num_classes=5)
        self.seen = {"train": [], "val": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch[0])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch[0])
        super().validation_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch[0])
        super().test_step(batch, batch_idx)


def trainer(tmp_path, **arguments):
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    return Trainer(**{"max_epochs": 1, "accelerator": "cpu", "default_root_dir": tmp_path} | quiet | arguments)


def labels_of(loader):
    return torch.cat([labels for _, labels in loader])


@pytest.mark.parametrize(("total", "size"), [(100, 0), (100, 10), (97, 13), (20, 19), (20, 20)])
def test_stratified_split_gives_each_class_its_share(total, size):
    labels = torch.randint(4, (total,), generator=torch.Generator().manual_seed(2))
    kept, aside = stratified_split(labels, size, seed=3)
    assert sorted([*kept.tolist(), *aside.tolist()]) == list(range(total))
    assert len(aside) == size
    share = labels.bincount(minlength=4) * size / total
    assert (labels[aside].bincount(minlength=4) - share).abs().max() <= 1


def test_split_depends_on_its_seed_alone():
    def aside(seed):
        return stratified_split(torch.arange(100) % 5, 20, seed)[1].tolist()

    torch.manual_seed(1)
    first = aside(0)
    torch.manual_seed(2)
    assert aside(0) == first
    assert aside(1) != first


def test_setup_describes_the_data_and_never_reads_twice():
    data = RandomData(val_size=20)
    for stage in ("fit", "fit", "validate"):
        data.setup(stage)
    assert data.reads == ["train"]
    assert (data.num_classes, data.classes, data.image_shape) == (5, list("abcde"), (3, 4, 4))
    data.setup("test")
    data.setup()
    assert data.reads == ["train", "test"]


def test_loaders_cover_each_part_once():
    data = RandomData(val_size=0.2, batch_size=32, eval_batch_size=8)
    train, val, test = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert [len(labels_of(part)) for part in (train, val, test)] == [80, 20, 30]
    assert [part.batch_size for part in (train, val, test)] == [32, 8, 8]
    assert isinstance(train.sampler, RandomSampler)
    assert isinstance(val.sampler, SequentialSampler)
    pixels = torch.cat([images for part in (train, val) for images, _ in part])
    assert torch.equal(pixels.flatten(1).unique(dim=0), random_images(100, seed=0).images.flatten(1).unique(dim=0))


def test_val_size_zero_trains_on_everything(tmp_path):
    data, model = RandomData(val_size=0), Recorder()
    assert data.val_dataloader() == []
    trainer(tmp_path).fit(model, datamodule=data)
    assert sum(map(len, model.seen["train"])) == 100
    assert model.seen["val"] == []


def test_normalisation_equals_torchvision():
    data = RandomData(val_size=20)
    data.setup("fit")
    pixels = torch.cat([images for images, _ in data.train_dataloader()])
    scaled = pixels.double() / 255
    assert torch.allclose(data.mean.double(), scaled.mean(dim=(0, 2, 3)), atol=1e-7)
    assert torch.allclose(data.std[:2].double(), scaled[:, :2].std(dim=(0, 2, 3), correction=0), atol=1e-7)
    assert data.std[2] == 1
    expected = normalize(pixels.float() / 255, data.mean.tolist(), data.std.tolist())
    assert data.normalize(pixels).dtype == torch.float32
    assert torch.allclose(data.normalize(pixels), expected, atol=1e-6)


def test_augments_only_while_training(tmp_path):
    data, model = RandomData(val_size=20, horizontal_flip=True, crop_padding=1), Recorder()
    fit = trainer(tmp_path, max_epochs=2)
    fit.fit(model, datamodule=data)
    assert data.reads == ["train"]
    fit.test(model, datamodule=data, verbose=False)

    def known(images, original):
        rows = {tuple(row) for row in original.flatten(1).tolist()}
        return [tuple(row) in rows for row in torch.cat(images).flatten(1).tolist()]

    val = [data.normalize(images) for images, _ in data.val_dataloader()]
    assert all(known(model.seen["val"], torch.cat(val)))
    assert all(known(model.seen["test"], data.normalize(random_images(30, seed=1).images)))
    assert sum(known(model.seen["train"], data.normalize(random_images(100, seed=0).images))) < 50


def test_without_a_trainer_nothing_is_augmented():
    data = RandomData(horizontal_flip=True, crop_padding=1)
    images, labels = next(iter(data.train_dataloader()))
    normalised, same = data.on_after_batch_transfer((images, labels), 0)
    assert torch.equal(normalised, data.normalize(images))
    assert same is labels


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_images_have_the_precision_of_the_trainer(tmp_path, precision, dtype):
    model = Recorder()
    trainer(tmp_path, precision=precision).fit(model, datamodule=RandomData())
    assert {images.dtype for images in model.seen["train"] + model.seen["val"]} == {dtype}


def test_workers_yield_the_same_batches():
    one, two = (RandomData(num_workers=count).val_dataloader() for count in (0, 1))
    for (images, labels), (others, other_labels) in zip(one, two, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


def pixels_of_a_fit(tmp_path, make_trainer, **arguments):
    seed_everything(3)
    data, model = RandomData(val_size=20, horizontal_flip=True, crop_padding=1, batch_size=16, **arguments), Recorder()
    make_trainer(max_epochs=2).fit(model, datamodule=data)
    return data, torch.cat(model.seen["train"]), torch.cat(model.seen["val"])


def test_images_kept_on_the_device_are_cropped_and_flipped_alike(tmp_path):
    """The same images in the same order: what the ordinary loader gives after a kill, this one does."""

    def on_cpu(**arguments):
        return trainer(tmp_path, **arguments)

    _, train, val = pixels_of_a_fit(tmp_path, on_cpu)
    _, other_train, other_val = pixels_of_a_fit(tmp_path, on_cpu, on_device=True)
    assert torch.equal(train, other_train) and torch.equal(val, other_val)
    with pretending():
        data, other_train, other_val = pixels_of_a_fit(tmp_path, pretended_trainer, on_device=True)
        assert data.train_dataloader().dataset.dataset.images.device.type == "cuda"
        assert other_train.device.type == "cuda"
        assert torch.equal(train, other_train.cpu()) and torch.equal(val, other_val.cpu())


def test_nothing_is_copied_to_the_device_in_a_step(tmp_path):
    with pretending():
        data = RandomData(val_size=20, on_device=True)
        data.trainer = pretended_trainer()
        data.setup("fit")
        for images, labels in data.train_dataloader():
            assert images.device.type == labels.device.type == "cuda"


@pytest.mark.parametrize("arguments", [{"num_workers": 1}, {"pin_memory": True}])
def test_images_on_the_device_need_no_workers(arguments):
    with pytest.raises(ValueError, match="on_device=True needs neither"):
        RandomData(on_device=True, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"batch_size": 12.5},
        {"eval_batch_size": -1},
        {"num_workers": -1},
        {"crop_padding": -1},
        {"val_size": -1},
        {"val_size": 1.0},
    ],
)
def test_arguments_are_checked(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name} .* got {value}"):
        RandomData(**arguments)


@pytest.mark.parametrize("val_size", [100, 0.999])
def test_val_size_must_leave_training_images(val_size):
    with pytest.raises(ValueError, match=f"val_size={val_size} .* 100 training images"):
        RandomData(val_size=val_size).setup("fit")
