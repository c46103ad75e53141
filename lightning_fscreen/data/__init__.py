"""Data sets as Lightning data modules."""

from lightning_fscreen.data.augment import random_crop, random_horizontal_flip
from lightning_fscreen.data.cifar import CIFAR10DataModule
from lightning_fscreen.data.datamodule import ImageDataModule
from lightning_fscreen.data.digits import DigitsDataModule
from lightning_fscreen.data.features import FeatureDataModule, FeatureSet
from lightning_fscreen.data.folder import ImageFolderDataModule
from lightning_fscreen.data.generated import (
    FlippedDigitsDataModule,
    GeneratedDataModule,
    PairsDataModule,
    ShellsDataModule,
    SpectraDataModule,
    SumsDataModule,
    XorDataModule,
)
from lightning_fscreen.data.images import ImageSet, TensorImages
from lightning_fscreen.data.khan import KhanDataModule
from lightning_fscreen.data.mnist import MNISTDataModule
from lightning_fscreen.data.noisy import NoisyMNISTDataModule
from lightning_fscreen.data.texts import GeneratedTextsDataModule

__all__ = [
    "CIFAR10DataModule",
    "DigitsDataModule",
    "FeatureDataModule",
    "FeatureSet",
    "FlippedDigitsDataModule",
    "GeneratedDataModule",
    "GeneratedTextsDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageSet",
    "KhanDataModule",
    "MNISTDataModule",
    "NoisyMNISTDataModule",
    "PairsDataModule",
    "ShellsDataModule",
    "SpectraDataModule",
    "SumsDataModule",
    "TensorImages",
    "XorDataModule",
    "random_crop",
    "random_horizontal_flip",
]
