"""Generated texts: what a text is, and that nothing but the order of its words tells the class."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from lightning_fscreen.data import GeneratedTextsDataModule
from tests.data.test_generated import everything


def test_the_class_is_that_of_the_word_behind_the_cue_and_counts_of_words_say_next_to_nothing():
    data = GeneratedTextsDataModule(train_size=3000, test_size=2000)
    texts, labels = everything(data)
    texts = data.normalize(texts.view(3000, 1, 1, -1))
    assert texts.shape == (3000, 16) and texts.dtype == torch.int64 and data.num_classes == 4
    cue = (texts == 0).nonzero()
    assert cue[:, 0].tolist() == list(range(3000))
    behind = texts[cue[:, 0], cue[:, 1] + 1]
    assert torch.equal((behind - 1) // 3, labels) and labels.unique().tolist() == [0, 1, 2, 3]
    held, answers = everything(data, test=True)
    counts = [torch.nn.functional.one_hot(each.long(), 100).sum(1).numpy() for each in (texts, held)]
    score = LogisticRegression(max_iter=500).fit(counts[0], labels.numpy()).score(counts[1], answers.numpy())
    assert 0.25 < score < 0.5


def test_the_split_seed_decides_and_no_global_generator_is_touched():
    state = torch.get_rng_state()
    first, again, other = (GeneratedTextsDataModule(split_seed=seed).load_train().images for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "arguments",
    [{"words": 12}, {"words": 257}, {"length": 1}, {"train_size": 0}, {"crop_padding": 2}, {"num_classes": 1}],
)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ValueError, match="must|cannot"):
        GeneratedTextsDataModule(**arguments)
