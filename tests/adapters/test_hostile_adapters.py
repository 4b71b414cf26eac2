"""Adapters whose configuration asks for what no model has, or for too much: one line, in bounded memory."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapter_kinds import KINDS, peft_model
from support.project import ROOT

import minilora
from minilora import LoraConfig, QuantConfig, UserError
from minilora.adapters.peft_format import ROWS, tensor_key
from minilora.targets import chosen_targets


@pytest.fixture
def adapter(tmp_path):
    """A base model, and a plain adapter on it that `change` edits."""
    peft_model(KINDS["plain"], tmp_path / "base").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(adapter, tensors, **keys) -> None:
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | keys))
    save_file(load_file(weights) | tensors, weights)


@pytest.mark.parametrize("quant", [None, QuantConfig()])
@pytest.mark.parametrize(
    "name", ["", "model", "model.layers.0.mlp", "model.norm", "layers.0.self_attn.k_proj"]
)
def test_rows_of_what_is_no_matrix_are_refused_in_one_line_and_the_model_stays_as_it_was(
    adapter, name, quant
):
    path = name if name.startswith("model") else f"model.{name}"
    change(adapter, {tensor_key(path, ROWS): torch.ones(1, 48)}, trainable_token_indices={name: [3]})
    model = minilora.load_model(adapter.parent / "base", quant)
    before = [name for name, _ in model.named_modules()]
    if name.endswith("k_proj") and quant is None:  # a plain linear layer: PEFT replaces its rows, too
        minilora.load_adapter(model, adapter)
        return
    with pytest.raises(UserError) as refusal:
        minilora.load_adapter(model, adapter)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) <= 500
    assert [name for name, _ in model.named_modules()] == before


def test_layer_numbers_that_no_layer_has_cost_nothing_and_change_nothing(monkeypatch):
    """Ten thousand numbers times a thousand words were ten million patterns, in 2 GB."""
    matched = []
    original = minilora.targets.match_names
    monkeypatch.setattr(
        minilora.targets,
        "match_names",
        lambda ways, *rest, **how: matched.append(len(ways)) or original(ways, *rest, **how),
    )
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    words = ["layers", *(f"block{i}" for i in range(99))]
    config = LoraConfig(
        target_modules=["q_proj"], layers_to_transform=[1, *range(3, 10_000)], layers_pattern=words
    )
    assert chosen_targets(names, config) == [names[1]]
    assert matched == [len(words)]


@pytest.mark.parametrize(
    "shape, said", [((), "model.embed_tokens.weight is ()"), ((5, 192), "5 rows"), ((0, 192), "0 rows")]
)
def test_an_embedding_that_is_no_matrix_or_too_short_for_the_tokenizer_is_refused_by_the_merger(
    call, tmp_path, shape, said
):
    base, adapter = ROOT / "assets" / "base", tmp_path / "adapter"
    model = minilora.load_model(base)
    minilora.add_lora(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    minilora.save_adapter(model, adapter, base_model_name_or_path=str(base))
    change(adapter, {tensor_key("model.embed_tokens", "weight"): torch.ones(shape)})
    code, out, err = call("merge", "--adapter", adapter, "--output", tmp_path / "merged")
    assert code == 2 and err.count("\n") == 1 and said in err, out + err
    assert not (tmp_path / "merged").exists()
