"""Exactness of removing units (neurons, channels with and without batch norms, heads) from whole networks.

    python tests/benchmarks/units.py RESULTS.jsonl torchvision [NETWORK ...]   # resumable: what is there is skipped
    python tests/benchmarks/units.py RESULTS.jsonl timm NETWORK ...
    python tests/benchmarks/units.py RESULTS.jsonl transformers [NETWORK ...]  # small random ones
    python tests/benchmarks/units.py RESULTS.jsonl --table                     # as Markdown

A random half of the units of every network, those that share their fate together, no layer empty, with `bias="zero"`
and `bias="fold"` (what "mean" is to `slim`: the biases are what they are). Random scales, shifts and running
statistics. The slim network against the one with zeros in its rows, or in the columns that read a head: the largest
difference of the outputs relative to the largest output, in float64, in eval and in train mode (without dropout and
stochastic depth). Two 64 × 64 images, where the network takes no other size; two texts of nine tokens, the second
with two of padding. Without names: every classification network of torchvision under 170 M parameters, all
configurations of transformers below.
"""

import copy
import inspect
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils import _pytree as pytree

from lightning_fscreen import find_gates, slim
from lightning_fscreen.slimming import CaptureError, VerificationError

LARGEST = 170_000_000
SIZES = {"inception_v3": 299, "googlenet": 96, "maxvit_t": 224, "efficientformer_l1": 224, "crossvit_tiny_240": 240}


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "num_labels": 3}
TEXT = {**SMALL, "vocab_size": 100, "max_position_embeddings": 32, "pad_token_id": 0}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
GROUPED = {**TEXT, "num_key_value_heads": 2}
CODERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_labels": 3}
CODERS |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32, "vocab_size": 100}
CODERS |= {"max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "num_labels": 3}
T5 |= {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
GPT = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "num_labels": 3}
GPT |= {"pad_token_id": 0}
STAGES = {"image_size": 32, "num_labels": 3, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
STAGES |= {"num_attention_heads": [1, 2, 4, 4], "sr_ratios": [4, 2, 1, 1]}
SOUND = {**SMALL, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
SOUND |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16}
SOUND |= {"vocab_size": 32, "apply_spec_augment": False, "layerdrop": 0.0}
TRANSFORMERS = {
    "Bert": TEXT,
    "Roberta": TEXT,
    "Electra": {**TEXT, "embedding_size": 16},
    "Albert": {**TEXT, "embedding_size": 16},
    "MPNet": {**TEXT, "pad_token_id": 1},
    "DebertaV2": TEXT,
    "SqueezeBert": {**TEXT, "embedding_size": 32, **{f"{part}_groups": 1 for part in ("q", "k", "v", "output")}}
    | {"post_attention_groups": 1, "intermediate_groups": 1},
    "ModernBert": {**TEXT, "cls_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "bos_token_id": 1},
    "DistilBert": {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "num_labels": 3}
    | {"max_position_embeddings": 32},
    "RemBert": {**TEXT, "input_embedding_size": 16, "output_embedding_size": 16},
    "RoFormer": {**TEXT, "embedding_size": 32},
    "ConvBert": {**TEXT, "embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3},
    "MobileBert": {**TEXT, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}
    | {"intermediate_size": 32},
    "Esm": {**TEXT, "mask_token_id": 4, "position_embedding_type": "rotary"},
    "BigBird": {**TEXT, "attention_type": "original_full"},
    "Yoso": {**TEXT, "use_expectation": True},
    "XLNet": {"vocab_size": 100, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "num_labels": 3}
    | {"pad_token_id": 0},
    "Funnel": {"vocab_size": 100, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64}
    | {"num_labels": 3, "num_decoder_layers": 1},
    "Xmod": {**TEXT, "languages": ["en_XX"], "default_language": "en_XX"},
    "GPT2": GPT,
    "GPTJ": {**GPT, "rotary_dim": 4},
    "GPTBigCode": GPT,
    "OpenAIGPT": GPT,
    "CTRL": {**GPT, "dff": 64},
    "GPTNeo": {**TEXT, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    | {"window_size": 4},
    "Falcon": {**TEXT, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "Bloom": {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4, "num_labels": 3, "pad_token_id": 0},
    "OPT": {**TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "GPTNeoX": TEXT,
    "Phi": TEXT,
    "Llama": GROUPED,
    "Mistral": GROUPED,
    "Qwen2": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 8},
    "StableLm": GROUPED,
    "Phi3": GROUPED,
    "Gemma2": {**GROUPED, "head_dim": 8},
    "Olmo2": GROUPED,
    "Starcoder2": GROUPED,
    "Nemotron": GROUPED,
    "Persimmon": TEXT,
    "Glm": {**GROUPED, "head_dim": 8},
    "DiffLlama": GROUPED,
    "Gemma": {**TEXT, "num_key_value_heads": 1, "head_dim": 8},
    "Bart": CODERS,
    "MBart": CODERS,
    "T5": T5,
    "ViT": VISION,
    "DeiT": VISION,
    "Beit": {**VISION, "use_relative_position_bias": True},
    "Dinov2": VISION,
    "Swin": {**WINDOWS, "num_labels": 3},
    "Swinv2": {**WINDOWS, "num_labels": 3},
    "DonutSwin": {**WINDOWS, "num_labels": 3},
    "Dinov2WithRegisters": VISION,
    "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": 3, "image_size": 32},
    "PvtV2": STAGES,
    "Segformer": STAGES,
    "Hiera": {"num_labels": 3, "embed_dim": 16, "image_size": [32, 32], "depths": [1, 1], "num_heads": [2, 4]}
    | {"patch_size": [3, 3], "patch_stride": [4, 4], "masked_unit_size": [4, 4], "patch_padding": [1, 1]}
    | {"num_query_pool": 1},
    "Levit": {"image_size": 64, "num_labels": 3, "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 4, 4]}
    | {"depths": [1, 1, 1], "key_dim": [8, 8, 8]},
    "Wav2Vec2": SOUND,
    "Hubert": SOUND,
}


def build(library: str, name: str) -> tuple[nn.Module, Any]:
    """A network in float64 without dropout, and its inputs."""
    torch.manual_seed(0)
    if library == "transformers":
        import transformers

        settings = TRANSFORMERS[name]
        images = "image_size" in settings
        task = "ImageClassification" if images else "SequenceClassification"
        config = getattr(transformers, f"{name}Config")(**settings)
        net = getattr(transformers, f"{name}For{task}")(config)
        tokens = torch.randint(3, 100, (2, 9))
        tokens[:, -1] = 2
        mask = (torch.arange(9) < torch.tensor([[9], [9 if name in ("Bart", "MBart", "T5") else 7]])).long()
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if "use_cache" in inspect.signature(net.forward).parameters:
            inputs["use_cache"] = False
        if images:
            size = 64 if settings["image_size"] == 64 else 32
            inputs = {"pixel_values": torch.randn(2, 3, size, size, dtype=torch.float64)}
        if "conv_dim" in settings:
            inputs = {"input_values": torch.randn(2, 400, dtype=torch.float64)}
    elif library == "torchvision":
        from torchvision import models

        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        net = getattr(models, name)(**options)
        size = SIZES.get(name, 224 if "vit_" in name else 64)
    else:
        import timm

        size = SIZES.get(name, 64)
        try:
            net = timm.create_model(name, num_classes=100, img_size=size)
        except (TypeError, AssertionError, RuntimeError):  # sizes of windows and tables that it does not fit
            net = timm.create_model(name, num_classes=100)
            size = net.default_cfg["input_size"][-1]
    if library != "transformers":
        inputs = torch.randn(2, 3, size, size, dtype=torch.float64)
    for module in net.modules():
        if "Drop" in type(module).__name__ or type(module).__name__ == "StochasticDepth":
            for attribute in ("p", "drop_prob", "drop_path"):
                if hasattr(module, attribute):
                    setattr(module, attribute, 0.0)
        for attribute in (
            "dropout",
            "attention_dropout",
            "attn_dropout",
            "attn_pdrop",
            "dropout_prob",
            "activation_dropout",
        ):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
        if isinstance(module, _BatchNorm | nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if module.bias is not None:
                nn.init.normal_(module.bias)
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    for parameter in net.parameters():
        if parameter.abs().max() < 1e-3:  # heads and scales that begin at, or next to, zero would hide all errors
            nn.init.normal_(parameter, std=0.1)
    return net.double().eval(), inputs


def masks_of(gates, seed=0):
    """A random half of all units; every gate keeps at least one."""
    generator = torch.Generator().manual_seed(seed)
    units = sorted({unit for gate in gates for unit in gate.units if unit >= 0})
    draws = torch.rand(len(units), generator=generator)
    pruned = {unit for unit, draw in zip(units, draws.tolist(), strict=True) if draw < 0.5}
    keep = {}
    for gate in gates:
        mask = torch.tensor([unit not in pruned for unit in gate.units])
        if gate.excluded is None and not mask.all():
            if not mask.any():
                pruned -= set(gate.units)
            keep[gate.name] = mask
    return {gate.name: torch.tensor([unit not in pruned for unit in gate.units]) for gate in gates if gate.name in keep}


@torch.no_grad()
def switch_off(net, gates, keep, bias):
    """Zeros in the rows of the pruned units, in the scales of the pruned channels, in the columns that read a head."""
    for gate in gates:
        if gate.name not in keep:
            continue
        mask, module = keep[gate.name], net.get_submodule(gate.projection or gate.name)
        weight = module.weight.t() if type(module).__name__ == "Conv1D" else module.weight  # GPT-2's are transposed
        if gate.kind == "head":
            weight[:, ~mask.repeat_interleave(weight.shape[1] // len(mask))] = 0
            continue
        if isinstance(module, _ConvTransposeNd):
            weight = weight.unflatten(0, (module.groups, -1)).transpose(1, 2)
            mask = mask.unflatten(0, (module.groups, -1))
        weight[~mask] = 0
        if bias == "zero" and module.bias is not None:
            module.bias[~mask.flatten()] = 0


def outputs(net, inputs, training):
    """All tensors that it returns, as one."""
    torch.manual_seed(1)
    with torch.no_grad():
        found = net.train(training)(**inputs) if isinstance(inputs, dict) else net.train(training)(inputs)
    net.eval()
    found = pytree.tree_leaves(found.logits if hasattr(found, "logits") else found)
    return torch.cat([item.flatten() for item in found if isinstance(item, torch.Tensor)])


def trial(library, name):
    """One network."""
    net, inputs = build(library, name)
    row = {"library": library, "network": name, "params": sum(p.numel() for p in net.parameters())}
    try:
        start = time.perf_counter()
        gates = find_gates(net, inputs)
        row["find"] = time.perf_counter() - start
        keep = masks_of(gates)
        for kind in ("neuron", "channel", "head"):
            own = [gate for gate in gates if gate.kind == kind]
            row[kind] = [sum(gate.excluded is None for gate in own), len(own)]
        row["reasons"] = dict(Counter(gate.excluded for gate in gates if gate.excluded).most_common(5))
        for bias in ("zero", "fold"):
            masked, own = copy.deepcopy(net), copy.deepcopy(net) if bias == "zero" else net
            switch_off(masked, gates, keep, bias)
            start = time.perf_counter()
            plan = slim(own, keep, inputs, bias=bias)
            row[f"slim_{bias}"] = time.perf_counter() - start
            row[f"left_{bias}"] = sum(p.numel() for p in own.parameters()) / row["params"]
            row[f"kept_{bias}"] = len(plan.kept_for)
            for training in (False, True):
                a, b = outputs(masked, inputs, training), outputs(own, inputs, training)
                row[f"error_{bias}_{'train' if training else 'eval'}"] = float((a - b).abs().max() / a.abs().max())
    except (CaptureError, VerificationError, ValueError) as error:
        row["refused"] = f"{type(error).__name__}: {error}"[:300]
    return row


def table(rows):
    """As Markdown."""
    print("| network | parameters | neurons' layers | batch norms | attention | left | error | what keeps its units |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        name = f"`{row['network']}`"
        if "refused" in row:
            print(f"| {name} | {row['params']:,} | | | | | refused | {row['refused']} |")
            continue
        error = max(value for key, value in row.items() if key.startswith("error"))
        counts = [f"{row[kind][0]} of {row[kind][1]}" if row[kind][1] else "" for kind in ("neuron", "channel", "head")]
        left, why = row["left_zero"], _why(row["reasons"])
        print(f"| {name} | {row['params']:,} | {' | '.join(counts)} | {left:.3f} | {error:.0e} | {why} |")


def _why(reasons):
    """The two most frequent ones, without names of modules."""
    found = Counter()
    for reason, count in reasons.items():
        if "output of the" not in reason and "belong to the heads" not in reason:
            found[re.sub(r" in module '[^']*'", "", reason)] += count
    return "; ".join(f"{count}: {reason}" for reason, count in found.most_common(2))


def main():
    """Run, or print."""
    path, library, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if library == "--table":
        table(rows)
        return
    if not names and library == "transformers":
        names = list(TRANSFORMERS)
    if not names:
        from torchvision import models

        weights = {
            name: models.get_model_weights(name).DEFAULT.meta["num_params"] for name in models.list_models(models)
        }
        names = sorted((name for name, count in weights.items() if count < LARGEST), key=weights.__getitem__)
    done = {(row["library"], row["network"]) for row in rows}
    for name in names:
        if (library, name) not in done:
            row = trial(library, name)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(name, row, flush=True)


if __name__ == "__main__":
    main()
