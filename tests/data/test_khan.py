import numpy as np
import pytest

from lightning_fscreen.data import KhanDataModule

SIZES = {"train": 63, "test": 20}


@pytest.fixture
def folder(tmp_path):
    """Files of the same form, with random numbers."""
    rng = np.random.default_rng(0)
    for part, size in SIZES.items():
        header = ",".join(f'"V{i}"' for i in range(12))
        genes = rng.normal(size=(size, 12))
        np.savetxt(tmp_path / f"Khan_x{part}.csv", genes, delimiter=",", header=header, comments="")
        np.savetxt(tmp_path / f"Khan_y{part}.csv", np.arange(size) % 4 + 1, fmt="%d", header='"x"', comments="")
    return tmp_path


def test_all_tumours_are_split_anew_by_every_seed(folder):
    def labels_and_sizes(seed):
        data = KhanDataModule(root=str(folder), test_size=27, batch_size=100, split_seed=seed)
        data.prepare_data()
        data.setup()
        ((train, _),), ((test, labels),) = data.train_dataloader(), data.test_dataloader()
        assert train.shape == (56, 1, 1, 12) and data.num_classes == 4
        assert np.bincount(labels, minlength=4).min() >= 6  # stratified
        return test

    assert not np.array_equal(labels_and_sizes(0), labels_and_sizes(1))


def test_missing_files_say_where_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="Khan_xtrain.csv.*pip install.*ISLP.*data.root"):
        KhanDataModule(root=str(tmp_path)).prepare_data()
