"""Networks to train and prune, and the Lightning module that trains them."""

from lightning_fscreen.models.classifier import ImageClassifier
from lightning_fscreen.models.convnext import ConvNeXt, convnext
from lightning_fscreen.models.densenet import DenseNet, densenet40
from lightning_fscreen.models.fully_connected import MLP, mlp
from lightning_fscreen.models.lenet import LeNet300100, lenet300_100
from lightning_fscreen.models.resnet import PreActResNet, resnet20, resnet164
from lightning_fscreen.models.transformer import TextTransformer, ViT, text_transformer, vit
from lightning_fscreen.models.vgg import VGG, vgg16_bn

__all__ = [
    "MLP",
    "VGG",
    "ConvNeXt",
    "DenseNet",
    "ImageClassifier",
    "LeNet300100",
    "PreActResNet",
    "TextTransformer",
    "ViT",
    "convnext",
    "densenet40",
    "lenet300_100",
    "mlp",
    "resnet20",
    "resnet164",
    "text_transformer",
    "vgg16_bn",
    "vit",
]
