"""Networks to train and prune, and the Lightning module that trains them."""

from lightning_fscreen.models.classifier import ImageClassifier
from lightning_fscreen.models.lenet import LeNet300100, lenet300_100

__all__ = ["ImageClassifier", "LeNet300100", "lenet300_100"]
