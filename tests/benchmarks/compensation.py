"""What pruned channels should put out: test error right after pruning a trained network, before any fine-tuning.

    python tests/benchmarks/compensation.py CHECKPOINT FOLDER [AMOUNT] [SCREENING_WEIGHT]

CHECKPOINT: of `fscreen experiment=resnet20_cifar10 callbacks=none`, while it trains; FOLDER: an image folder of
CIFAR-10. Statistics come from one pass over the training images in eval mode.
"""

import copy
import sys

import torch

from lightning_fscreen import models, slim
from lightning_fscreen.criteria import resolve_criterion
from lightning_fscreen.data import ImageFolderDataModule
from lightning_fscreen.granularity import Channels
from lightning_fscreen.network import InputRecorder


@torch.no_grad()
def error(network, data):
    network.eval()
    wrong = total = 0
    for images, labels in data.test_dataloader():
        wrong += int((network(data.normalize(images)).argmax(1) != labels).sum())
        total += len(labels)
    return 100 * wrong / total


def pruned(network, data, amount, screening_weight):
    """Candidates, masks and statistics."""
    channels = Channels(network, None, None, "mean")
    recorder = InputRecorder([("", network)])
    images, _ = next(iter(data.train_dataloader()))
    recorder.inputs = (data.normalize(images[:2]),), {}
    channels.meet(recorder)
    collector = channels.collector(data.num_classes)
    collector.attach()
    network.eval()
    with torch.no_grad():
        for images, labels in data.train_dataloader():
            network(data.normalize(images))
            collector.update(labels)
    collector.remove()
    statistics, kept = collector.statistics(), channels.masks().kept
    scores = resolve_criterion("screening_sum").score(
        channels.ranked(kept, statistics, {}), screening_weight, torch.Generator()
    )
    return recorder.inputs[0], channels.prune(scores, kept, amount, "global", 1), statistics


def main(checkpoint, folder, amount=0.5, screening_weight=0.05):
    torch.manual_seed(0)
    network = models.resnet20()
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    network.load_state_dict(
        {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}
    )
    data = ImageFolderDataModule(root=folder, val_size=0)
    data.setup()
    inputs, keep, statistics = pruned(network, data, amount, screening_weight)
    total, kept = (sum(map(size, keep.values())) for size in (len, lambda mask: int(mask.sum())))
    print(f"{kept} of {total} channels kept, λ = {screening_weight}")
    print(f"before: {error(network, data):.2f} % test error")
    for bias in ("zero", "fold", "mean"):
        changed = copy.deepcopy(network)
        if bias == "mean":
            channels = Channels(changed, None, None, "mean")
            recorder = InputRecorder([("", changed)])
            recorder.inputs = inputs, {}
            channels.meet(recorder)
            channels.after_pruning({name: torch.ones_like(mask) for name, mask in keep.items()}, keep, statistics)
        plan = slim(changed, keep, inputs, "zero" if bias == "zero" else "fold")
        params = sum(p.numel() for p in changed.parameters())
        print(f"{bias}: {error(changed, data):.2f} %, {params:,} parameters, {len(plan.biases)} new biases", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(float, sys.argv[3:]))
