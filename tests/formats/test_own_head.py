"""A file with an output head of its own under a config that says tied: transformers keeps the file's head."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import relative_error, transformers_model
from support.tiny import ids

from minilora import LoraConfig, add_lora, load_model, save_adapter, save_model
from minilora.formats.weights import read_model

TOLERANCE = 1e-5  # float32 sums in another order, as in test_model


@pytest.fixture(params=["qwen2-bias-tied", "llama-tied"])
def theirs(request):
    """A model with tied weights in transformers."""
    if request.param == "llama-tied":
        return transformers_model("llama-gqa", vocab_size=320, tie_word_embeddings=True)
    return transformers_model(request.param, vocab_size=320)


@pytest.fixture
def directory(tmp_path, theirs, model_dir):
    """That model's files, with a random output head beside the embedding; `config.json` still says tied."""
    theirs.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))
    save_file(tensors | {"lm_head.weight": 0.1 * noise}, path, metadata={"format": "pt"})
    (tmp_path / "base" / "tokenizer.model").write_bytes((model_dir / "tokenizer.model").read_bytes())
    return tmp_path / "base"


def logits_of_transformers(directory) -> torch.Tensor:
    import transformers

    logging.getLogger("transformers.modeling_utils").setLevel(
        logging.ERROR
    )  # it says that config.json is wrong
    load = transformers.AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        return load(directory, attn_implementation="eager").eval()(ids(2, 20)).logits


@torch.no_grad()
def test_the_head_in_the_file_is_used_as_in_transformers(directory, theirs):
    expected = logits_of_transformers(directory)
    assert relative_error(theirs(ids(2, 20)).logits, expected) > 0.1, "the tied head gives other logits"
    ours = load_model(directory)
    assert relative_error(ours(ids(2, 20)), expected) <= TOLERANCE
    assert ours.config.tie_word_embeddings is False


def test_saved_again_it_gives_the_same_logits_in_transformers(directory, tmp_path):
    expected = logits_of_transformers(directory)
    save_model(load_model(directory), tmp_path / "again")
    assert relative_error(logits_of_transformers(tmp_path / "again"), expected) <= TOLERANCE


def test_an_equal_head_in_the_file_leaves_the_model_tied(directory):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    model = load_model(directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings


def test_a_rounded_head_and_one_of_another_shape_are_not_the_embedding(directory):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    for head in (embedding.bfloat16(), embedding[:-1].clone()):
        save_file(tensors | {"lm_head.weight": head}, path, metadata={"format": "pt"})
        assert not read_model(directory)[0].tie_word_embeddings


def random_adapter(directory, adapter) -> None:
    model = load_model(directory)
    add_lora(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    save_adapter(model, adapter, base_model_name_or_path=str(directory))


@torch.no_grad()
def test_merged_it_is_written_with_its_own_head_which_may_be_adapted_too(directory, tmp_path, merge):
    from minilora import load_adapter

    random_adapter(directory, tmp_path / "adapter")
    code, _, err = merge("--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert code == 0, err
    expected = load_model(directory)
    load_adapter(expected, tmp_path / "adapter")
    assert relative_error(logits_of_transformers(tmp_path / "merged"), expected(ids(2, 20))) <= TOLERANCE
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_gguf_file_of_it_holds_both_matrices(directory, tmp_path, merge):
    gguf = pytest.importorskip("gguf")
    random_adapter(directory, tmp_path / "adapter")
    options = ("--adapter", tmp_path / "adapter", "--output", tmp_path / "m.gguf", "--outtype", "f16")
    code, _, err = merge(*options)
    assert code == 0, err
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {"token_embd.weight", "output.weight"} <= names


def test_a_run_plans_its_memory_for_the_head_that_the_file_holds(directory, train, trainer, monkeypatch):
    plans, make_plan = [], trainer.make_plan
    monkeypatch.setattr(trainer, "make_plan", lambda *given: plans.append(make_plan(*given)) or plans[-1])
    train(model=directory, max_steps=1)
    assert plans[0].model_config.tie_word_embeddings is False
