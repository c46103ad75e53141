import pytest
import torch

from lightning_fscreen.data import NoisyMNISTDataModule
from tests.data.test_mnist import LABELS, PIXELS, root  # noqa: F401


def everything(loader):
    batches = list(loader)
    return torch.cat([images for images, _ in batches]).flatten(1), torch.cat([labels for _, labels in batches])


@pytest.fixture
def make(root):  # noqa: F811
    def make(**arguments):
        small = {"train_size": 20, "noise_columns": 500, "val_size": 10}
        data = NoisyMNISTDataModule(root=str(root), **{**small, **arguments})
        data.prepare_data()
        data.setup("fit")
        return data

    return make


def test_pixels_come_first_and_noise_of_the_same_spread_behind_them(make):
    data = make()
    assert data.image_shape == (1, 1, 784 + 500)
    features, labels = everything(data.train_dataloader())
    assert features.shape == (20, 1284)
    assert float(features[:, :784].mean()) == pytest.approx(0, abs=1e-5)
    assert float(features[:, :784].std()) == pytest.approx(1, abs=1e-3)
    assert float(features[:, 784:].mean()) == pytest.approx(0, abs=0.05)
    assert float(features[:, 784:].std()) == pytest.approx(1, abs=0.05)
    pixels = {PIXELS[i].tobytes(): int(LABELS[i]) for i in range(40)}
    first = features[:, :784]
    restored = ((first - first.min()) / (first.max() - first.min()) * 255).round().to(torch.uint8)
    assert [pixels[row.numpy().tobytes()] for row in restored] == labels.tolist()


def test_validation_and_test_have_the_same_columns_and_their_own_noise(make):
    data = make()
    val, labels = everything(data.val_dataloader())
    assert labels.tolist() == LABELS[40:].tolist()
    test, _ = everything(data.test_dataloader())
    assert val.shape[1] == test.shape[1] == 1284
    assert not torch.equal(val[:10, 784:], test[:10, 784:])


def test_the_split_seed_decides_and_no_global_generator_is_touched(make):
    state = torch.get_rng_state()
    made = [make(split_seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    one, same, other = (everything(data.val_dataloader())[0] for data in made)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_more_images_than_there_are_is_an_error(make):
    with pytest.raises(ValueError, match="train_size=45 and val_size=10.*50"):
        make(train_size=45)
    with pytest.raises(ValueError, match="noise_columns.*-1"):
        make(noise_columns=-1)
