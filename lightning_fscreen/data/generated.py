"""Generated tasks whose relevant inputs comparisons of class means do not see, one by one."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_fscreen.data.digits import DigitsDataModule
from lightning_fscreen.data.features import FeatureDataModule, FeatureSet


class GeneratedDataModule(FeatureDataModule):
    """Base of the generated data sets: relevant features first, columns of standard normal noise behind them.

    The instances, and the noise, are the same for the same ``split_seed``. Features are not standardised.

    Args:
        noise_columns: number of columns of noise.
        val_size: number or fraction of the training instances set aside for validation.
        **common: arguments of :class:`FeatureDataModule`; ``root`` is accepted and ignored.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(self, *, noise_columns: int, val_size: int | float = 0, **common: Any) -> None:
        super().__init__(val_size=val_size, standardize=False, **common)
        if noise_columns < 0:
            raise ValueError(f"noise_columns must not be negative, got {noise_columns}")
        self.noise_columns = noise_columns

    @abstractmethod
    def relevant(self, test: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """Relevant features (N, p), float32, their labels (N,), and the number of classes."""

    def load_train(self) -> FeatureSet:
        """Generate the training instances."""
        return self._load(test=False)

    def load_test(self) -> FeatureSet:
        """Generate the test instances."""
        return self._load(test=True)

    def _load(self, test: bool) -> FeatureSet:
        generator = torch.Generator().manual_seed(2 * self.split_seed + int(test))
        features, labels, num_classes = self.relevant(test, generator)
        noise = torch.randn(len(features), self.noise_columns, generator=generator)
        return FeatureSet(torch.cat([features, noise], dim=1), labels, [str(name) for name in range(num_classes)])


class SampledDataModule(GeneratedDataModule):
    """Base of those whose instances are drawn from a distribution, as many as are asked for.

    Args:
        train_size: number of training instances.
        test_size: number of test instances.
        **common: arguments of :class:`GeneratedDataModule`.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(self, *, train_size: int = 8000, test_size: int = 4000, **common: Any) -> None:
        super().__init__(**common)
        self.train_size = _at_least(1, "train_size", train_size)
        self.test_size = _at_least(1, "test_size", test_size)


class XorDataModule(SampledDataModule):
    """Two classes: whether an odd number of the relevant, normally distributed features is positive.

    Every feature alone, and every set of them but the whole, is independent of the class.

    Args:
        relevant_columns: number of relevant features.
        noise_columns: number of columns of noise.
        **common: arguments of :class:`SampledDataModule`.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self,
        *,
        relevant_columns: int = 2,
        noise_columns: int = 40,
        **common: Any,
    ) -> None:
        super().__init__(noise_columns=noise_columns, **common)
        self.relevant_columns = _at_least(2, "relevant_columns", relevant_columns)

    def relevant(self, test: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """Draw them."""
        count = self.test_size if test else self.train_size
        features = torch.randn(count, self.relevant_columns, generator=generator)
        return features, (features > 0).sum(1) % 2, 2


class PairsDataModule(SampledDataModule):
    """Two classes: the sign of a sum of products of pairs of features and of features that count alone.

    y = 1 if Σ_k x_{2k}·x_{2k+1} / √pairs + Σ_j x_j / √alone > 0, with standard normal features. Those of the pairs have
    the same distribution in both classes, each by itself.

    Args:
        pairs: number of pairs.
        alone: number of features that count alone.
        noise_columns: number of columns of noise.
        **common: arguments of :class:`SampledDataModule`.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self,
        *,
        pairs: int = 10,
        alone: int = 5,
        noise_columns: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(noise_columns=noise_columns, **common)
        self.pairs = _at_least(1, "pairs", pairs)
        self.alone = _at_least(0, "alone", alone)

    def relevant(self, test: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """Draw them."""
        count = self.test_size if test else self.train_size
        features = torch.randn(count, 2 * self.pairs + self.alone, generator=generator)
        paired, alone = features.split([2 * self.pairs, self.alone], dim=1)
        score = paired.unflatten(1, (self.pairs, 2)).prod(2).sum(1) / self.pairs**0.5
        score += alone.sum(1) / max(self.alone, 1) ** 0.5
        return features, (score > 0).long(), 2


class ShellsDataModule(SampledDataModule):
    """Concentric shells: the classes are the quantiles of the distance of a normally distributed point from the origin.

    Every relevant feature has the same mean, 0, in every class, and a larger variance in the outer ones.

    Args:
        relevant_columns: dimension of the space.
        num_shells: number of classes, equally frequent.
        train_size: number of training instances.
        noise_columns: number of columns of noise.
        **common: arguments of :class:`SampledDataModule`.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self,
        *,
        relevant_columns: int = 10,
        num_shells: int = 3,
        train_size: int = 4000,
        noise_columns: int = 200,
        **common: Any,
    ) -> None:
        super().__init__(train_size=train_size, noise_columns=noise_columns, **common)
        self.relevant_columns = _at_least(1, "relevant_columns", relevant_columns)
        self.num_shells = _at_least(2, "num_shells", num_shells)

    def relevant(self, test: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """Draw them."""
        count = self.test_size if test else self.train_size
        features = torch.randn(count, self.relevant_columns, generator=generator)
        # The squared distance is chi-squared: its distribution function turns equal shares of [0, 1] into the shells.
        share = torch.special.gammainc(torch.tensor(self.relevant_columns / 2), features.square().sum(1) / 2)
        labels = (share * self.num_shells).long().clamp(max=self.num_shells - 1)
        return features, labels, self.num_shells


class SumsDataModule(SampledDataModule):
    """Features most of which tell little, and some more: the class is the largest of weighted sums of parts of them.

    y = argmax_c Σ_{j ≡ c mod num_classes} w_j·x_j, with standard normal features, and weights w_j that are quantiles of
    the size of a standard normal variable, spread evenly over the classes.

    Args:
        relevant_columns: number of relevant features.
        num_classes: number of classes, equally frequent.
        train_size: number of training instances.
        noise_columns: number of columns of noise.
        **common: arguments of :class:`SampledDataModule`.

    Raises:
        ValueError: for an argument outside its range, or features that cannot be shared out equally.
    """

    def __init__(
        self,
        *,
        relevant_columns: int = 200,
        num_classes: int = 2,
        train_size: int = 1000,
        noise_columns: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(train_size=train_size, noise_columns=noise_columns, **common)
        self.parts = _at_least(2, "num_classes", num_classes)
        self.relevant_columns = _at_least(1, "relevant_columns", relevant_columns)
        if relevant_columns % num_classes:
            raise ValueError(
                f"relevant_columns must be a multiple of num_classes, got {relevant_columns} for {num_classes} classes"
            )

    def relevant(self, test: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """Draw them."""
        count = self.test_size if test else self.train_size
        features = torch.randn(count, self.relevant_columns, generator=generator)
        per_class = self.relevant_columns // self.parts
        weights = torch.special.ndtri(0.5 + (torch.arange(per_class) + 0.5) / (2 * per_class))
        sums = (features.unflatten(1, (per_class, self.parts)) * weights[:, None]).sum(1)
        return features, sums.argmax(1), self.parts


class SpectraDataModule(SampledDataModule):
    """Spectra of varying intensity: most channels are the same in all classes, but tell the intensity of the others.

    x(t) = a·b(t) + Σ_{k=1}^{3} u_k·exp(−(t − p_{ck})² / 0.0005)/4 + ε at t = 0 … 1, with a uniform between ½ and 1½,
    u_k between 0 and 1, ε normal of standard deviation 0.05; b is the sum of six bands exp(−(t − q)² / 0.01). Where the
    bands of b and of the classes c are is drawn once.

    Args:
        relevant_columns: number of channels.
        num_classes: number of classes, equally frequent.
        train_size: number of training instances.
        noise_columns: number of columns of noise.
        **common: arguments of :class:`SampledDataModule`.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self,
        *,
        relevant_columns: int = 400,
        num_classes: int = 5,
        train_size: int = 1000,
        noise_columns: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(train_size=train_size, noise_columns=noise_columns, **common)
        self.relevant_columns = _at_least(1, "relevant_columns", relevant_columns)
        self.kinds = _at_least(2, "num_classes", num_classes)

    def relevant(self, test: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """Draw them; the bands, of the split seed alone, are those of training and test."""
        count, places = self.test_size if test else self.train_size, torch.linspace(0, 1, self.relevant_columns)
        drawn = torch.Generator().manual_seed(2 * self.split_seed)
        common, own = torch.rand(6, 1, generator=drawn), torch.rand(self.kinds, 3, 1, generator=drawn)
        labels = torch.randint(self.kinds, (count,), generator=generator)
        bands = (-((places - own) ** 2) / 0.0005).exp()[labels]
        base = (-((places - common) ** 2) / 0.01).exp().sum(0)
        intensity, heights = (torch.rand(count, size, generator=generator) for size in (1, 3))
        features = (0.5 + intensity) * base + (heights.unsqueeze(2) * bands).sum(1) / 4
        return features + 0.05 * torch.randn(features.shape, generator=generator), labels, self.kinds


class FlippedDigitsDataModule(GeneratedDataModule):
    """Scikit-learn's digits, flattened and divided by their standard deviation, each image's sign drawn at random.

    Every pixel has mean 0 in every class.

    Args:
        noise_columns: number of columns of noise.
        **common: arguments of :class:`GeneratedDataModule`.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(self, *, noise_columns: int = 200, **common: Any) -> None:
        super().__init__(noise_columns=noise_columns, **common)

    def relevant(self, test: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """Flip the 1,497 images for training, or the 300 for testing."""
        source = DigitsDataModule()
        train = source.load_train()
        images = source.load_test() if test else train
        pixels = images.images.flatten(1).float() / train.images.float().std()
        signs = 2 * torch.randint(2, (len(pixels), 1), generator=generator) - 1
        return pixels * signs, images.labels, 10


def _at_least(least: int, name: str, value: int) -> int:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value
