import pytest
import torch

from lightning_fscreen.data import FeatureDataModule, FeatureSet
from tests.pretended import pretending

FEATURES = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * 3 + 100
FEATURES[:, 2] = 7.0
LABELS = torch.arange(40) % 4


class Table(FeatureDataModule):
    def load_train(self):
        return FeatureSet(FEATURES, LABELS)

    def load_test(self):
        return FeatureSet(FEATURES[:8], LABELS[:8])


def test_every_feature_is_standardised_over_the_training_part():
    data = Table(val_size=8, batch_size=32)
    data.setup("fit")
    assert (data.num_classes, data.image_shape) == (4, (1, 1, 6))
    ((features, labels),) = data.train_dataloader()
    assert features.shape == (32, 1, 1, 6) and features.dtype == torch.float32 and labels.dtype == torch.int64
    values = data.normalize(features).view(32, 6)
    torch.testing.assert_close(values.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    expected = torch.tensor([1.0, 1, 0, 1, 1, 1])  # the third is constant
    torch.testing.assert_close(values.std(0, correction=0), expected, atol=1e-4, rtol=0)


def test_features_can_stay_as_they_are():
    data = Table(val_size=8, batch_size=8, standardize=False)
    ((features, _),) = data.test_dataloader()
    assert torch.equal(data.normalize(features).view(8, 6), FEATURES[:8])


@pytest.mark.parametrize("arguments", [{"crop_padding": 1}, {"horizontal_flip": True}])
def test_what_only_images_have_is_refused(arguments):
    with pytest.raises(ValueError, match="cannot be cropped or flipped"):
        Table(**arguments)


@pytest.mark.parametrize(
    ("features", "labels", "said"),
    [
        (FEATURES.double(), LABELS, "float64"),
        (FEATURES[0], LABELS[:1], r"\(6,\)"),
        (FEATURES, LABELS[:3], "40 rows.*got 3"),
    ],
)
def test_features_and_labels_that_do_not_fit_are_errors(features, labels, said):
    with pytest.raises(ValueError, match=said):
        FeatureSet(features, labels)


def test_features_can_be_kept_on_the_device():
    with pretending():
        held = FeatureSet(torch.ones(4, 3), torch.arange(4))
        held.move(torch.device("cuda", 0))
        features, labels = held.__getitems__([1, 2])
        assert features.device.type == labels.device.type == "cuda"
