"""Any network of timm or torchvision by its name, as a classifier."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_fscreen.models.classifier import ImageClassifier


def timm_classifier(
    name: str, pretrained: bool = False, num_classes: int = 10, in_channels: int = 3, **training: Any
) -> ImageClassifier:
    """A network of timm (extra `timm`), with a new head for so many classes.

    Args:
        name: as in `timm.list_models()`.
        pretrained: start from timm's weights, which are downloaded if they are not there.
        num_classes: number of logits.
        in_channels: channels of the images.
        **training: arguments of :class:`ImageClassifier`.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: timm has no network of that name.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("model=timm needs timm: pip install 'lightning-fscreen[timm]'") from error
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name.partition('.')[0]}*")[:5]
        raise ValueError(
            f"timm has no network named {name!r}; timm.list_models() lists all"
            + (f", such as {', '.join(similar)}" if similar else "")
        )
    net = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels)
    return ImageClassifier(net, num_classes=num_classes, **training)


def torchvision_classifier(name: str, num_classes: int = 10, **training: Any) -> ImageClassifier:
    """A classification network of torchvision, for images of three channels, with random weights.

    Args:
        name: as in `torchvision.models.list_models(module=torchvision.models)`.
        num_classes: number of logits.
        **training: arguments of :class:`ImageClassifier`.

    Raises:
        ValueError: torchvision has no network of that name.
    """
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(
            f"torchvision has no network named {name!r}; choose one of {models.list_models(module=models)}"
        )
    net: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
    return ImageClassifier(net, num_classes=num_classes, **training)
