"""Generated texts, whose class depends on which word follows which."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_fscreen.data.datamodule import ImageDataModule
from lightning_fscreen.data.images import Batch, TensorImages


class GeneratedTextsDataModule(ImageDataModule):
    """Texts of words drawn at random: batches of word indices (N, length), int64, and labels (N,).

    One of the words is the cue; the class is that of the word behind it. Words of all classes stand anywhere in a text,
    so that counting them tells nothing; which one counts is seen by a network that looks from a word to the one before.
    Word 0 is the cue, the next `num_classes` · `synonyms` are those of the classes, the others mean nothing.

    Args:
        num_classes: number of classes C.
        synonyms: words of every class.
        words: size of the vocabulary, at most 256.
        length: words of a text.
        train_size: number of training texts.
        test_size: number of test texts.
        **common: arguments of :class:`ImageDataModule`; the same texts for the same ``split_seed``. ``root`` is
            accepted and ignored, arguments that only images have are refused.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self,
        *,
        num_classes: int = 4,
        synonyms: int = 3,
        words: int = 100,
        length: int = 16,
        train_size: int = 8000,
        test_size: int = 4000,
        val_size: int | float = 0,
        **common: Any,
    ) -> None:
        super().__init__(val_size=val_size, **common)
        if self.crop_padding or self.horizontal_flip:
            raise ValueError(
                "texts cannot be cropped or flipped: set crop_padding=0 and horizontal_flip=False, got "
                f"{self.crop_padding} and {self.horizontal_flip}"
            )
        if num_classes < 2 or synonyms < 1 or not 1 + num_classes * synonyms <= words <= 256:
            raise ValueError(
                "words must lie between 1 + num_classes · synonyms and 256, with two classes or more, got "
                f"{words} words, {num_classes} classes and {synonyms} synonyms"
            )
        if length < 2 or min(train_size, test_size) < 1:
            raise ValueError(
                "length must be at least 2, train_size and test_size at least 1, got "
                f"{length}, {train_size} and {test_size}"
            )
        self.classes = [str(name) for name in range(num_classes)]
        self.synonyms, self.words, self.length = synonyms, words, length
        self.train_size, self.test_size = train_size, test_size

    def load_train(self) -> TensorImages:
        """Draw the training texts."""
        return self._draw(self.train_size, test=False)

    def load_test(self) -> TensorImages:
        """Draw the test texts."""
        return self._draw(self.test_size, test=True)

    def normalize(self, images: Tensor) -> Tensor:
        """(N, 1, 1, length) bytes as indices of words (N, length), int64."""
        return images.flatten(1).long()

    def _draw(self, count: int, test: bool) -> TensorImages:
        generator = torch.Generator().manual_seed(2 * self.split_seed + int(test))
        texts = torch.randint(1, self.words, (count, self.length), generator=generator)
        # Half of the words are of some class, so that those behind the cue are a few among many.
        topical = torch.randint(1, 1 + len(self.classes) * self.synonyms, texts.shape, generator=generator)
        texts = torch.where(torch.rand(texts.shape, generator=generator) < 0.5, topical, texts)
        labels = torch.randint(len(self.classes), (count,), generator=generator)
        synonym = torch.randint(self.synonyms, (count,), generator=generator)
        place = torch.randint(self.length - 1, (count, 1), generator=generator)
        texts.scatter_(1, place, 0)
        texts.scatter_(1, place + 1, (1 + labels * self.synonyms + synonym)[:, None])
        return TensorImages(texts.to(torch.uint8).view(count, 1, 1, -1), labels, self.classes)

    def _fit_normalization(self, images: Dataset[Batch], train: Tensor) -> None:
        self.image_shape = (1, 1, self.length)
        self.mean, self.std = torch.zeros(1), torch.ones(1)
