"""New tokens of a run: their rows, what is trained of them, and every program that reads the result."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.families import same_model_here, transformers_model
from support.project import ROOT
from support.tiny import tiny_model

from minilora import (
    LoraConfig,
    UserError,
    add_lora,
    load_model,
    load_tokenizer,
    save_adapter,
    save_model,
    set_adapter,
)
from minilora.adapters.save_load import load_adapter, read_adapter_config
from minilora.formats.gguf_vocabulary import CONTROL, UNUSED, USER_DEFINED, read_vocabulary
from minilora.formats.weights import read_config
from minilora.linear import Linear4bit
from minilora.lora import trainable_parameters
from minilora.new_rows import grow_vocabulary
from minilora.quantization import quantize_4bit
from minilora.run.settings import TrainConfig
from minilora.run.vocabulary import train_rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::UserWarning:transformers")

EMBED, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
TOKENS = dict(new_special_tokens="<call>,</call>", add_tokens="<x>")
# Float32 sums in another order, as in test_model.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tied_dir():
    """The model that comes with minilora: its head is its embedding."""
    return ROOT / "assets" / "base"


@pytest.fixture
def rows(tmp_path):
    """Examples with the new tokens, special and plain."""
    path = tmp_path / "calls.jsonl"
    examples = [{"prompt": f"say <call> {w}", "completion": f"<call> {w} </call><x>"} for w in "abcdef"]
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


# ---- rows for them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_at_the_mean_take_at_most_their_share_of_the_probability(tied):
    # Jensen's inequality. The noise, 3e-5 of |h| |w|, moves the bound by less than 1e-3.
    model, tokens = tiny_model(tie_word_embeddings=tied), torch.arange(60).view(4, 15)
    with torch.no_grad():
        before = model(tokens).log_softmax(-1)
        grow_vocabulary(model, 128, seed=3)
        after = model(tokens).log_softmax(-1)
    lost = before - after[..., :61]
    assert (lost >= 0).all() and lost.max() <= math.log(128 / 61) + 1e-3
    assert torch.allclose(lost, lost[..., :1].expand_as(lost), atol=1e-5)  # of all tokens alike: a softmax


def test_rows_have_the_mean_of_those_of_transformers():
    theirs = transformers_model("llama-mha")
    ours = same_model_here(theirs)
    grow_vocabulary(ours, 128)
    theirs.resize_token_embeddings(128)
    pairs = (ours.model.embed_tokens, theirs.model.embed_tokens), (ours.lm_head, theirs.lm_head)
    for mine, other in pairs:
        old, spread = other.weight[:97], other.weight[:97].std()
        assert torch.equal(mine.weight[:97], old) and mine.weight.shape == other.weight.shape
        # Both draw noise of a covariance 1e-9 times the old rows': 3.2e-5 of their spread. Six of it, and both.
        assert (mine.weight[97:] - other.weight[97:]).abs().max() <= 2 * 6 * 3.2e-5 * spread
        assert (mine.weight[97:] - old.mean(0)).abs().max() > 0


def test_the_rows_follow_from_the_seed_and_spare_rows_stay():
    models = [tiny_model() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        grow_vocabulary(model, 64, seed)
        grow_vocabulary(model, 60, seed)
    one, same, other = (model.lm_head.weight for model in models)
    assert torch.equal(one, same) and not torch.equal(one, other) and len(one) == 64


def test_a_quantized_head_takes_no_new_tokens():
    model = tiny_model()
    model.lm_head = Linear4bit(quantize_4bit(model.lm_head.weight.data))
    with pytest.raises(UserError, match="lm_head is in 4 or 8 bits, and takes no new tokens"):
        grow_vocabulary(model, 64)


def test_a_grown_vocabulary_lies_once_in_memory_and_comes_back_bit_for_bit(tmp_path):
    def storages(model):
        return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}

    model = tiny_model(tie_word_embeddings=True)
    grow_vocabulary(model, 128, seed=1)
    before = sum(storages(model).values())
    add_lora(model, LoraConfig(r=1, target_modules=("q_proj",), trainable_token_indices=(61, 62)))
    trained = sum(p.nbytes for p in trainable_parameters(model).values())
    assert sum(storages(model).values()) == before + trained
    save_adapter(model, tmp_path)
    again = tiny_model(tie_word_embeddings=True)
    grow_vocabulary(again, 128, seed=2)
    load_adapter(again, tmp_path)
    assert sum(storages(again).values()) == before + trained
    tokens = torch.tensor([[1, 61, 62, 127]])
    with torch.no_grad():
        assert torch.equal(model(tokens), again(tokens))
        for each in (model, again):
            set_adapter(each, None)
        assert torch.equal(model(tokens), again(tokens))


@torch.no_grad()
def logits_of(model, tokens):
    """Of a model here, in transformers or in PEFT."""
    logits = model.eval()(input_ids=tokens)
    return getattr(logits, "logits", logits)


# ---- which rows are trained --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tied, whole, trained",
    [
        (True, (), (7, 8)),  # the head shares them
        (False, (), {"embed_tokens": [7, 8], "lm_head": [7, 8]}),
        (False, ("lm_head",), {"embed_tokens": [7, 8]}),
        (True, ("embed_tokens",), {"lm_head": [7, 8]}),
        (True, ("embed_tokens", "lm_head"), ()),
    ],
)
def test_rows_are_trained_where_the_whole_is_not(tied, whole, trained):
    config = tiny_model(tie_word_embeddings=tied).config
    lora = train_rows(LoraConfig(modules_to_save=whole), [7, 8], config)
    assert lora.trainable_token_indices == trained


@pytest.mark.parametrize("base", ["tied", "untied"])
def test_a_run_trains_the_new_rows_and_no_old_one(base, train, rows, model_dir, tied_dir):
    source = tied_dir if base == "tied" else model_dir
    size, width = read_config(source).vocab_size, read_config(source).hidden_size
    out, printed = train(model=source, dataset=rows, lora_target="q_proj", lora_rank=1, **TOKENS)
    assert f"tokens     3 new: '<x>' {size}; '<call>' {size + 1}; '</call>' {size + 2}\n" in printed
    tensors, old = load_file(out / "adapter_model.safetensors"), load_model(source).state_dict()
    padded = -(-(size + 3) // 64) * 64
    layers = {EMBED: "model.embed_tokens.weight", HEAD: "lm_head.weight"}
    started = {}
    for key, name in layers.items():
        grown, new = (
            tensors[f"{key}.token_adapter.{n}"] for n in ("base_layer.weight", "trainable_tokens_delta")
        )
        stored = old["model.embed_tokens.weight" if base == "tied" else name]
        assert grown.shape == (padded, width) and torch.equal(grown[:size], stored.to(grown.dtype))
        assert new.shape == (3, width) and (new - grown[size : size + 3]).abs().amax(1).min() > 1e-5
        started[key] = new
    assert torch.equal(*started.values()) == (base == "tied")
    rows_trained = 3 * width * (1 if base == "tied" else 2)
    lora = sum(t.numel() for key, t in tensors.items() if "lora_" in key)
    assert f"trainable  {lora + rows_trained:,} of " in printed
    assert f"base.resize_token_embeddings({padded})\n" in (out / "README.md").read_text()


@pytest.mark.parametrize("base", ["tied", "untied"])
@pytest.mark.parametrize("whole", [None, "embed_tokens,lm_head"], ids=["rows", "whole"])
def test_peft_loads_it_as_the_card_says_and_transformers_the_merged_model(
    base, whole, train, rows, model_dir, tied_dir, merge, tmp_path
):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    source = tied_dir if base == "tied" else model_dir
    out, _ = train(
        model=source, dataset=rows, bf16="false", learning_rate=1e-2, additional_target=whole, **TOKENS
    )
    ours = load_model(source, dtype=torch.float32)
    load_adapter(ours, out)
    tokenizer = load_tokenizer(out)
    tokens = torch.tensor([tokenizer.encode("say <call> a</call> <x>b")])
    assert tokens.max() >= read_config(source).vocab_size
    expected = logits_of(ours, tokens)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    theirs.resize_token_embeddings(expected.shape[-1])
    theirs = peft.PeftModel.from_pretrained(theirs, out)
    assert (logits_of(theirs, tokens) - expected).abs().max() <= TOLERANCE * expected.abs().max()

    code, _, err = merge("--adapter", out, "--output", tmp_path / "merged", "--model", source)
    assert code == 0, err
    config = read_config(tmp_path / "merged")
    assert config.vocab_size == expected.shape[-1]
    assert config.tie_word_embeddings == (base == "tied" and whole is None)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = "say <call> a</call> <x>b"
    assert read.encode(text, add_special_tokens=False) == tokenizer.encode(text, bos=False)
    # The small model's files hold bfloat16: merged weights are off by 2^-9, in two blocks of each of 4 layers.
    tolerance = 2**-9 * 8 if base == "tied" else TOLERANCE
    assert (logits_of(merged, tokens) - expected).abs().max() <= tolerance * expected.abs().max()


def test_the_gguf_vocabulary_has_them_as_tokens_that_are_found_whole(train, rows):
    out, _ = train(dataset=rows, **TOKENS)
    tokenizer = load_tokenizer(out)
    vocabulary = read_vocabulary(out, 384)
    types = {token: vocabulary.types[tokenizer.token_id(token)] for token in ("<x>", "<call>", "</call>")}
    assert types == {"<x>": USER_DEFINED, "<call>": CONTROL, "</call>": CONTROL}
    assert vocabulary.types[tokenizer.vocab_size :] == [UNUSED] * (384 - tokenizer.vocab_size)


# ---- which tokens are new ----------------------------------------------------------------------------------


def test_tokens_that_are_there_are_only_trained_and_nothing_grows(train, model_dir):
    tokenizer = load_tokenizer(model_dir)
    there = [tokenizer.token(i) for i in (300, 301)]
    out, printed = train(add_tokens=",".join(there))
    assert f"tokens     none is new; there already, and only trained: {there[0]!r}; {there[1]!r}\n" in printed
    assert (out / "tokenizer.model").read_bytes() == (model_dir / "tokenizer.model").read_bytes()
    assert read_adapter_config(out).trainable_token_indices == {
        "embed_tokens": [300, 301],
        "lm_head": [300, 301],
    }
    tensors = load_file(out / "adapter_model.safetensors")
    assert {k for k in tensors if "lora_" not in k} == {
        f"{layer}.token_adapter.trainable_tokens_delta" for layer in (EMBED, HEAD)
    }
    assert "resize_token_embeddings" not in (out / "README.md").read_text()


def test_rows_to_spare_are_taken_before_any_is_added(train, rows, model_dir, tmp_path):
    spare = tmp_path / "spare"
    shutil.copytree(model_dir, spare)
    size = read_config(model_dir).vocab_size
    assert size == load_tokenizer(model_dir).vocab_size
    roomy = model_with_rows(model_dir, spare, size + 40)
    out, _ = train(model=roomy, dataset=rows, **TOKENS)
    tensors = load_file(out / "adapter_model.safetensors")
    assert not any("base_layer" in key for key in tensors)
    assert read_adapter_config(out).trainable_token_indices["lm_head"] == [size, size + 1, size + 2]


def model_with_rows(source, target, rows):
    """A copy of a model with more rows of embedding than its tokenizer has tokens."""
    model = load_model(source)
    grow_vocabulary(model, rows)
    model.config = replace(model.config, vocab_size=rows)
    save_model(model, target)
    return target


def test_resize_vocab_trains_tokens_of_the_tokenizer_that_have_no_rows(train, rows, model_dir, tmp_path):
    first, _ = train("first", dataset=rows, **TOKENS)
    both = tmp_path / "both"
    shutil.copytree(model_dir, both)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(first / name, both / name)
    size = read_config(model_dir).vocab_size
    _, err = train("second", model=both, dataset=rows, code=2)
    assert f"the model has {size} tokens" in err and err.count("\n") == 1 and "resize_vocab" in err
    out, _ = train("third", model=both, dataset=rows, resize_vocab="true")
    assert read_adapter_config(out).trainable_token_indices["lm_head"] == [size, size + 1, size + 2]


@pytest.mark.parametrize(
    "keys, named",
    [
        (dict(new_special_tokens="<a>,<a>"), "'<a>' is there twice"),
        (dict(new_special_tokens="<a>", add_tokens="<a>"), "'<a>' is there twice"),
        (dict(add_tokens="a,,b"), "'' cannot be a token"),
        (dict(add_tokens="<a>", adapter_name_or_path="x"), "add_tokens is decided by the adapter"),
        (dict(resize_vocab=True, adapter_name_or_path="x"), "resize_vocab is decided by the adapter"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_line(keys, named):
    with pytest.raises(UserError, match=named) as error:
        TrainConfig(**keys)
    assert "\n" not in str(error.value)


def test_a_head_with_an_update_and_new_tokens_is_refused_before_anything_is_written(train, rows):
    out, err = train(dataset=rows, lora_target="q_proj,lm_head", code=2, **TOKENS)
    assert "lora_target names the embedding or the head" in err and err.count("\n") == 1
    assert not out.exists()


def test_the_files_of_a_plan_are_gone_when_the_script_ends(train, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    train(dataset=rows, **TOKENS)
    assert not list(tmp_path.glob("minilora-tokenizer-*"))


# ---- everything after training -----------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [None, "embed_tokens,lm_head"], ids=["rows", "whole"])
def test_a_resumed_run_ends_with_the_same_bits(train, rows, whole, tmp_path):
    keys = dict(dataset=rows, additional_target=whole, save_steps=2, lora_dropout=0.1, **TOKENS)
    straight, _ = train("straight", **keys)
    shutil.copytree(straight, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    resumed, printed = train("resumed", resume_from_checkpoint="latest", **keys)
    assert "resuming from" in printed and "after step 2 of 4" in printed
    one, other = (load_file(d / "adapter_model.safetensors") for d in (straight, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert load_tokenizer(straight).fingerprint() == load_tokenizer(resumed).fingerprint()
    _, err = train("resumed", code=2, resume_from_checkpoint="latest", **keys | dict(add_tokens="<y>"))
    assert "add_tokens is '<y>' here" in err


def test_the_best_adapter_comes_back_with_its_vocabulary(train, rows):
    # The learning rate is so large that the first evaluation is the best.
    keys = dict(dataset=rows, eval_dataset=rows, load_best_model_at_end="true", learning_rate=3, eval_steps=1)
    out, printed = train(**keys, **TOKENS, exact_match_samples=1)
    assert "back to the adapter of step" in printed
    assert f"{EMBED}.token_adapter.base_layer.weight" in load_file(out / "adapter_model.safetensors")


def test_evaluation_and_chat_read_the_tokens_with_the_base_model_too(train, rows, call):
    out, _ = train(dataset=rows, **TOKENS)
    code, printed, err = call("evaluate", "--adapter", out, "--dataset", rows)
    assert code == 0, err
    losses = {
        line.split()[0]: float(line.split()[1])
        for line in printed.splitlines()
        if line[:4] in ("base", "out ")
    }
    assert losses.keys() == {"base", "out"} and losses["out"] < losses["base"]
    code, _, err = call("chat", "--adapter", out, "--instruction", "say <call>", "--max_new_tokens", 2)
    assert code == 0, err


def test_training_goes_on_from_an_adapter_with_new_tokens(train, rows):
    first, _ = train("first", dataset=rows, **TOKENS)
    second, _ = train("second", dataset=rows, adapter_name_or_path=first)
    before, after = (load_file(d / "adapter_model.safetensors") for d in (first, second))
    assert before.keys() == after.keys()
    for key in before:
        moved = not torch.equal(before[key], after[key])
        assert moved == ("base_layer" not in key), key


def test_prepared_tokens_are_those_of_the_training(call, train, rows, model_dir, tmp_path):
    keys = [f"--{key}={value}" for key, value in TOKENS.items()]
    code, _, err = call(
        "prepare", "--model", model_dir, "--dataset", rows, "--output", tmp_path / "prepared", *keys
    )
    assert code == 0, err
    code, printed, err = call(
        "train", "--config", tmp_path / "prepared" / "train.yaml", "--output_dir", tmp_path / "out",
        "--max_steps", 1,
    )  # fmt: skip
    assert code == 0, err
    assert "tokens     lie ready in" in printed and "tokens     3 new" in printed
