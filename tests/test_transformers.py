"""Networks of transformers as people configure them: heads and hidden units go in a fit, and nothing is patched."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_fscreen import ScreeningPruningCallback, find_gates, load_slimmed, save_slimmed
from tests.conftest import trainer

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "num_labels": 3}
TEXT = {**SMALL, "vocab_size": 100, "max_position_embeddings": 32, "pad_token_id": 0}


def bert(**config):
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, **config))


def llama():
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    return transformers.LlamaForSequenceClassification(config)


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    config = transformers.GPT2Config(vocab_size=100, num_labels=3, pad_token_id=0, **sizes)
    return transformers.GPT2ForSequenceClassification(config)


def vit():
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8)
    return transformers.ViTForImageClassification(config)


def batch(make, count):
    labels = torch.arange(count) % 3
    if make is vit:
        return {"pixel_values": torch.randn(count, 3, 16, 16), "labels": labels}
    mask = (torch.arange(12) < torch.randint(6, 13, (count, 1))).long()
    return {"input_ids": torch.randint(1, 100, (count, 12)) * mask, "attention_mask": mask, "labels": labels}


class FineTuning(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, inputs, index):
        return self.net(**inputs).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


@pytest.mark.parametrize("make", [bert, llama, gpt2, vit])
def test_heads_and_hidden_units_go_in_a_fit_and_the_network_is_saved_loaded_and_compiled(make, tmp_path):
    data = batch(make, 24)
    rows = [{key: tensor[index] for key, tensor in data.items()} for index in range(24)]
    callback, model = ScreeningPruningCallback("unit", 0.5, end_epoch=1), FineTuning(make())
    trainer([callback], max_epochs=2).fit(model, DataLoader(rows, 8))
    report = callback.report()
    assert report.not_removed is None and report.kept == report.total // 2
    net, inputs = model.net.eval(), batch(make, 3)
    heads = {f"net.{gate.name}" for gate in find_gates(make(), inputs) if gate.kind == "head"}
    left = [layer.kept / layer.total for layer in report.layers if layer.name in heads]
    assert len(left) == 2 and min(left) < 1
    save_slimmed(net, tmp_path / "slim.safetensors")
    fresh = load_slimmed(make(), tmp_path / "slim.safetensors").eval()
    with torch.no_grad():
        logits = net(**inputs).logits
        assert torch.equal(fresh(**inputs).logits, logits)
        compiled = torch.compile(fresh, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs).logits, logits, rtol=1e-5, atol=1e-6)


def test_attention_that_is_asked_for_keeps_its_heads_and_says_why():
    inputs = {key: tensor for key, tensor in batch(bert, 2).items() if key != "labels"}
    network = bert(attn_implementation="eager", output_attentions=True)
    gates = {gate.name: gate for gate in find_gates(network, inputs)}
    heads = [gate.excluded for gate in gates.values() if gate.kind == "head"]
    assert len(heads) == 2 and all(reason == "it is an output of the network" for reason in heads)
    assert gates["bert.encoder.layer.0.intermediate.dense"].excluded is None
