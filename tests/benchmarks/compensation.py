"""What pruned channels should put out: test error right after pruning a trained network, before any fine-tuning.

    python tests/benchmarks/compensation.py CHECKPOINT FOLDER

CHECKPOINT: of a dense ResNet-20 trained by `fscreen experiment=resnet20_cifar10 ~callbacks.fscreen`; FOLDER: an image
folder of CIFAR-10. Every layer loses the same share of its channels, by the default criterion. Statistics come from one
pass over the training images in eval mode.
"""

import copy
import sys

import torch

from lightning_fscreen import models, slim
from lightning_fscreen.candidates.channels import Channels
from lightning_fscreen.data import ImageFolderDataModule
from lightning_fscreen.ranking.budgeted import rank_and_prune
from lightning_fscreen.ranking.criteria import ScoringContext, resolve_criterion

AMOUNTS = (0.1, 0.3, 0.5)
BIASES = ("zero", "fold", "mean")
SCREENING_WEIGHT = 0.25


@torch.no_grad()
def error(network, data):
    network.eval()
    wrong = total = 0
    for images, labels in data.test_dataloader():
        wrong += int((network(data.normalize(images)).argmax(1) != labels).sum())
        total += len(labels)
    return 100 * wrong / total


def ranked(network, data):
    """Channels, their scores and statistics, and the inputs of the network."""
    channels = Channels(network, None, None, "mean")
    images, _ = next(iter(data.train_dataloader()))
    inputs = (data.normalize(images[:2]),)
    channels.learn(network, inputs, {})
    collector = channels.collector(data.num_classes)
    collector.attach()
    network.eval()
    with torch.no_grad():
        for images, labels in data.train_dataloader():
            network(data.normalize(images))
            collector.update(labels)
    collector.remove()
    statistics = collector.statistics()
    known = channels.scoring_inputs(everything_of(channels), statistics, {})
    scores = resolve_criterion("screening").score(ScoringContext(known, SCREENING_WEIGHT))
    return channels, scores, statistics, inputs


def everything_of(channels):
    return {name: torch.ones_like(scale, dtype=torch.bool) for name, scale in channels.parameters().items()}


def main(checkpoint, folder):
    network = models.resnet20()
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    network.load_state_dict(
        {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}
    )
    data = ImageFolderDataModule(root=folder, val_size=0)
    data.setup()
    channels, scores, statistics, inputs = ranked(network, data)
    everything = everything_of(channels)
    print("| channels pruned | " + " | ".join(f'`bias="{bias}"`' for bias in BIASES) + " |")
    print("|---" * (1 + len(BIASES)) + "|")
    print("| none |" + f" {error(network, data):.2f} % |" * len(BIASES))
    for amount in AMOUNTS:
        keep = rank_and_prune(scores, everything, amount, scope="layer", units=channels.units())
        errors = []
        for bias in BIASES:
            changed = copy.deepcopy(network)
            if bias == "mean":
                own = Channels(changed, None, None, "mean")
                own.learn(changed, inputs, {})
                own.after_pruning({name: ~mask for name, mask in keep.items()}, statistics)
            slim(changed, keep, inputs, "zero" if bias == "zero" else "fold")
            errors.append(error(changed, data))
        print(f"| {100 * amount:g} % | " + " | ".join(f"{value:.2f} %" for value in errors) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
