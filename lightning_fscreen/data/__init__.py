"""Image data sets as Lightning data modules."""

from lightning_fscreen.data.augment import random_crop, random_horizontal_flip
from lightning_fscreen.data.cifar import CIFAR10DataModule
from lightning_fscreen.data.datamodule import ImageDataModule
from lightning_fscreen.data.digits import DigitsDataModule
from lightning_fscreen.data.folder import ImageFolderDataModule
from lightning_fscreen.data.images import ImageSet, TensorImages
from lightning_fscreen.data.mnist import MNISTDataModule

__all__ = [
    "CIFAR10DataModule",
    "DigitsDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageSet",
    "MNISTDataModule",
    "TensorImages",
    "random_crop",
    "random_horizontal_flip",
]
