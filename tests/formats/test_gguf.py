"""GGUF files: every value in them, and the logits that llama.cpp computes from them.

There are two references. A forward pass in numpy, below, follows llama.cpp's conventions (its names, its pairs
of dimensions, its division of frequencies) and shares no code with minilora. It runs everywhere. llama.cpp
itself runs where its wheel is installed: the package xllamacpp carries it.
"""

import errno
import json
import math
import shutil
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from support.families import FAMILIES, relative_error, transformers_model
from support.merging import adapted, make_base
from support.project import ROOT, WORDS
from support.tiny import ids
from tokenizers import pre_tokenizers
from tokenizers.trainers import BpeTrainer

from minilora import CausalLM, UserError, generate, load_model, load_tokenizer
from minilora.formats.config_json import parse_config
from minilora.formats.weights import read_config

gguf = pytest.importorskip("gguf")

from minilora.formats import gguf as gguf_export  # noqa: E402
from minilora.formats.gguf import deal_out_halves, write_gguf  # noqa: E402
from minilora.formats.gguf_vocabulary import _SPLITS, CONTROL, NORMAL, UNUSED, USER_DEFINED, read_vocabulary  # noqa: E402

V = 330  # rows of embedding, more than the tokenizer has tokens
TINY = dict(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
)
ARCHITECTURES = dict(Llama="llama", Mistral="llama", Ministral="llama", Qwen2="qwen2", Qwen3="qwen3")
ARCHITECTURES |= dict(SmolLM3="smollm3")
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
LONGROPE = dict(
    rope_type="longrope",
    short_factor=[1.0 + 0.05 * i for i in range(8)],
    long_factor=[1.0 + 0.5 * i for i in range(8)],
    original_max_position_embeddings=256,  # llama.cpp's context in these tests
)
QWEN2 = next(steps[0] for steps, name in _SPLITS.items() if name == "qwen2")
F16, F32, Q8_0 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0


def export(directory: Path, path: Path, outtype: str = "f16", tokenizer: Path | None = None) -> list[str]:
    """Write a model directory as a GGUF file, with its own or another tokenizer. Returns the notes."""
    return write(path, load_model(directory, dtype=torch.float32), tokenizer or directory, outtype)


def write(path: Path, model: CausalLM, tokenizer: Path, outtype: str = "f16") -> list[str]:
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    return write_gguf(path, tokenizer, model.config, shapes, lambda name: parameters[name].detach(), outtype)


@pytest.fixture(scope="module")
def ascii_tokenizer(tmp_path_factory) -> Path:
    """A directory with a byte-level BPE of whole characters, so that every generated token is text."""
    directory = tmp_path_factory.mktemp("ascii")
    byte_level_bpe(["gpt2"], WORDS, alphabet=[chr(i) for i in range(33, 127)]).save(
        str(directory / "tokenizer.json")
    )
    return directory


def byte_level_bpe(steps: list[str], text: list[str], alphabet: list[str]) -> tokenizers.Tokenizer:
    """A small tokenizer like Llama 3's and Qwen's, which splits a text into words by `steps`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    by_step = {
        "digits": pre_tokenizers.Digits(individual_digits=True),
        "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    }
    splits = [
        by_step.get(step) or pre_tokenizers.Split(tokenizers.Regex(step), behavior="isolated")
        for step in steps
    ]
    if "gpt2" not in steps:
        splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.Sequence(splits),
        tokenizers.decoders.ByteLevel(),
    )
    tokenizer.train_from_iterator(
        text, BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


@pytest.fixture(scope="module")
def exported(tmp_path_factory, model_dir):
    """FAMILY -> (model directory, GGUF file, notes), each made once. Weights are numbers that float16 holds."""
    made = {}

    def make(family: str) -> tuple[Path, Path, list[str]]:
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            theirs = transformers_model(family, vocab_size=V, hidden_size=64).half().float()
            theirs.save_pretrained(directory)
            shutil.copy(model_dir / "tokenizer.model", directory)
            made[family] = (
                directory,
                directory / f"{family}.gguf",
                export(directory, directory / f"{family}.gguf"),
            )
        return made[family]

    return make


def values(path: Path) -> dict:
    """All keys and values of a file's header."""
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


def tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors, dequantized."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def types(path: Path) -> dict:
    return {t.name: t.tensor_type for t in gguf.GGUFReader(path).tensors}


# ---- the values in the file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_the_models_with_llama_cpps_name_type_and_order_of_rows(exported, family):
    directory, path, _ = exported(family)
    model = load_model(directory, dtype=torch.float32)
    config, written, kinds = model.config, tensors(path), types(path)
    expected = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
    }
    if not config.tie_word_embeddings:
        expected["output.weight"] = model.lm_head.weight
    renamed = dict(
        q_proj="attn_q", k_proj="attn_k", v_proj="attn_v", o_proj="attn_output", q_norm="attn_q_norm"
    )
    renamed |= dict(k_norm="attn_k_norm", gate_proj="ffn_gate", up_proj="ffn_up", down_proj="ffn_down")
    renamed |= dict(input_layernorm="attn_norm", post_attention_layernorm="ffn_norm")
    for name, parameter in model.named_parameters():
        if name.startswith("model.layers."):
            layer, leaf, kind = (name.split(".")[i] for i in (2, -2, -1))
            if config.model_type in ("llama", "mistral", "ministral", "smollm3") and leaf in (
                "q_proj",
                "k_proj",
            ):
                K, rows = config.head_dim, []
                for head in range(parameter.shape[0] // K):
                    for pair in range(K // 2):
                        rows += [head * K + pair, head * K + pair + K // 2]
                parameter = parameter[rows]
            expected[f"blk.{layer}.{renamed[leaf]}.{kind}"] = parameter
    if config.rope.rope_type == "llama3":
        assert kinds.pop("rope_freqs.weight") == F32 and written.pop("rope_freqs.weight").shape == (
            config.head_dim // 2,
        )
    assert written.keys() == expected.keys()
    for name, parameter in expected.items():
        assert np.array_equal(written[name], parameter.detach().numpy()), name
        assert kinds[name] == (F16 if parameter.dim() == 2 else F32), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_the_header_agrees_with_the_configuration_and_the_tokenizer(exported, family, model_dir):
    directory, path, _ = exported(family)
    config, arch = (
        read_config(directory),
        ARCHITECTURES[FAMILIES[family][0]],
    )
    shape = {
        "block_count": {"smollm3-no-rope": 4}.get(family, 3),
        "context_length": {
            "mistral-window": 7,
            "qwen2-some-windows": 5,
            "ministral-some-windows": 6,
        }.get(family, 256),
        "embedding_length": 64,
        "feed_forward_length": 80,
        "attention.head_count": 4,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps, rel=1e-6),  # float32
        "vocab_size": V,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": {"llama3-rope": 500000.0, "smollm3-no-rope": 2000000.0}.get(family, 10000.0),
    }
    if family == "llama-linear-rope":
        shape |= {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    if family in ("llama-yarn", "qwen3-yarn"):
        shape |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
        shape |= {"rope.scaling.original_context_length": 16}
        its_own = 1 + 0.1 * math.log(4)
        given = (1 + 0.15 * math.log(4)) / (1 + 0.05 * math.log(4)) if family == "llama-yarn" else its_own
        shape |= {"rope.scaling.attn_factor": pytest.approx(given / its_own, rel=1e-6)}  # float32
    pieces = load_tokenizer(model_dir)._backend._model
    n = pieces.vocab_size()
    assert n < V
    expected = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": family,
        "general.file_type": 1,  # LLAMA_FTYPE_MOSTLY_F16
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [pieces.id_to_piece(i) for i in range(n)]
        + [f"[PAD{i}]" for i in range(n, V)],
        "tokenizer.ggml.scores": [pieces.get_score(i) for i in range(n)] + [0.0] * (V - n),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (n - 259) + [5] * (V - n),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
    }
    assert values(path) == expected | {f"{arch}.{key}": value for key, value in shape.items()}


@pytest.fixture
def chat_tokenizer(tmp_path) -> Path:
    """A byte-level BPE with special and other added tokens, a name for its end, and a chat template."""
    tokenizer = byte_level_bpe([QWEN2], WORDS, alphabet=["a", "b", "Ġ"])
    tokenizer.add_special_tokens(["<|end|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>"])
    (tmp_path / "chat").mkdir()
    tokenizer.save(str(tmp_path / "chat" / "tokenizer.json"))
    config = {
        "eos_token": "<|im_end|>",
        "chat_template": [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}],
    }
    (tmp_path / "chat" / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path / "chat"


def test_a_byte_level_tokenizer_is_written_with_its_merges_its_added_tokens_and_its_chat_template(
    tmp_path, chat_tokenizer
):
    here, raw = load_tokenizer(chat_tokenizer), json.loads((chat_tokenizer / "tokenizer.json").read_text())
    n = here.vocab_size
    end, im_end, think = (here.token_id(token) for token in ("<|end|>", "<|im_end|>", "<think>"))
    config = (
        dict(model_type="qwen2", vocab_size=n + 5, num_key_value_heads=2, eos_token_id=[im_end, end]) | TINY
    )
    model = CausalLM(parse_config(config))
    model.init_weights()
    write(tmp_path / "model.gguf", model, chat_tokenizer)
    written = {
        key: value for key, value in values(tmp_path / "model.gguf").items() if key.startswith("tokenizer.")
    }
    types = {
        **dict.fromkeys(range(n), NORMAL),
        end: CONTROL,
        im_end: CONTROL,
        think: USER_DEFINED,
        **dict.fromkeys(range(n, n + 5), UNUSED),
    }
    texts = {i: token for token, i in raw["model"]["vocab"].items()} | {
        i: f"[PAD{i}]" for i in range(n, n + 5)
    }
    texts |= {token["id"]: token["content"] for token in raw["added_tokens"]}
    assert written == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [texts[i] for i in range(n + 5)],
        "tokenizer.ggml.token_type": [types[i] for i in range(n + 5)],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in raw["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": im_end,
        "tokenizer.ggml.eot_token_id": end,
        "tokenizer.ggml.padding_token_id": here.pad_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "yes",
    }
    (chat_tokenizer / "chat_template.jinja").write_text("a file of its own")
    write(tmp_path / "model.gguf", model, chat_tokenizer)
    assert values(tmp_path / "model.gguf")["tokenizer.chat_template"] == "a file of its own"


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2-bias-tied"])
def test_in_8_bits_a_weight_is_off_by_half_a_step_of_its_block_and_no_more(
    exported, tmp_path, monkeypatch, family
):
    directory, path, _ = exported(family)
    notes = export(directory, tmp_path / "model.gguf", "q8_0")
    exact, written, kinds = tensors(path), tensors(tmp_path / "model.gguf"), types(tmp_path / "model.gguf")
    assert notes == [
        "rows that are no multiple of 32 long stay f16: 3 matrices, blk.0.ffn_down.weight among them"
    ]  # 80 columns
    assert values(tmp_path / "model.gguf")["general.file_type"] == 7  # LLAMA_FTYPE_MOSTLY_Q8_0
    assert written.keys() == exact.keys()
    for name, weight in exact.items():
        if weight.ndim == 1 or "ffn_down" in name:
            assert kinds[name] == (F32 if weight.ndim == 1 else F16) and np.array_equal(written[name], weight)
            continue
        largest = np.abs(weight.reshape(-1, 32)).max(1, keepdims=True)
        # Half a step of largest / 127, and 127 steps at most of a scale that float16 rounds by 2^-11 of
        # itself.
        bound = largest * (0.5 / 127 + 2**-11)
        assert (
            kinds[name] == Q8_0
            and (np.abs(written[name] - weight).reshape(-1, 32) <= bound * (1 + 1e-6)).all()
        ), name
    monkeypatch.setattr(gguf_export, "_ROWS", 7)
    export(directory, tmp_path / "pieces" / "model.gguf", "q8_0")
    assert (tmp_path / "pieces" / "model.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


def test_differences_in_llama_cpp_are_returned(exported):
    assert exported("llama-gqa")[2] == exported("qwen3-qk-norm")[2] == []
    assert exported("mistral-window")[2] == [
        "llama.cpp has no sliding window for this model: exact up to 7 tokens, the context length written"
    ]


# ---- the logits of llama.cpp's conventions ----------------------------------------------------------------------------


def logits_of_llama_cpp(path: Path, tokens: list[int], factors: str = "short") -> np.ndarray:
    """Logits (T, V) as llama.cpp's code computes them, in float64, from the tensors and the header alone.

    factors: LongRoPE's, "short" or "long", which llama.cpp chooses by the context that it is given.
    """
    w, header = {name: t.astype(np.float64) for name, t in tensors(path).items()}, values(path)
    arch = header["general.architecture"]
    get = lambda key, default=None: header.get(f"{arch}.{key}", default)  # noqa: E731
    H, G, K, T = (
        get("attention.head_count"),
        get("attention.head_count_kv"),
        get("attention.key_length"),
        len(tokens),
    )

    neighbours = arch in ("llama", "smollm3")

    def norm(x, name):
        return (
            x
            / np.sqrt((x**2).mean(-1, keepdims=True) + get("attention.layer_norm_rms_epsilon"))
            * w[f"{name}.weight"]
        )

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def yarn(old, new, original):  # the pairs between 32 and 1 turns within the original context
        first, last = (
            K * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(get("rope.freq_base")))
            for turns in (32, 1)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), K - 1)
        share = np.clip((np.arange(K // 2) - first) / max(last - first, 0.001), 0, 1)
        return old * (1 - share) + new * share

    def rope(x):  # (T, heads, K)
        old = get("rope.freq_base") ** (-np.arange(0, K, 2) / K)
        frequencies = old / w.get("rope_freqs.weight", w.get(f"rope_factors_{factors}.weight", 1.0))
        frequencies = frequencies / get("rope.scaling.factor", 1.0)
        length = get("rope.scaling.attn_factor", 1.0)
        if get("rope.scaling.type") == "yarn":
            frequencies = yarn(old, frequencies, get("rope.scaling.original_context_length"))
            length *= 1 + 0.1 * math.log(get("rope.scaling.factor"))
        angles = np.arange(T)[:, None, None] * frequencies  # (T, 1, K/2)
        first, second = (x[..., 0::2], x[..., 1::2]) if neighbours else (x[..., : K // 2], x[..., K // 2 :])
        turned = (
            first * np.cos(angles) - second * np.sin(angles),
            first * np.sin(angles) + second * np.cos(angles),
        )
        x = np.stack(turned, -1).reshape(x.shape) if neighbours else np.concatenate(turned, -1)
        return length * x

    x = w["token_embd.weight"][tokens]
    for i in range(get("block_count")):
        y = norm(x, f"blk.{i}.attn_norm")
        q, k, v = (linear(y, f"blk.{i}.attn_{p}").reshape(T, n, K) for p, n in (("q", H), ("k", G), ("v", G)))
        if arch == "qwen3":
            q, k = norm(q, f"blk.{i}.attn_q_norm"), norm(k, f"blk.{i}.attn_k_norm")
        if arch != "smollm3" or (i + 1) % 4:
            q, k = rope(q), rope(k)
        k, v = k.repeat(H // G, 1), v.repeat(H // G, 1)
        scores = np.einsum("thk,shk->hts", q, k) / np.sqrt(K) + np.triu(np.full((T, T), -np.inf), 1)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + linear(np.einsum("hts,shk->thk", shares, v).reshape(T, H * K), f"blk.{i}.attn_output")
        y = norm(x, f"blk.{i}.ffn_norm")
        gate = linear(y, f"blk.{i}.ffn_gate")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, f"blk.{i}.ffn_up"), f"blk.{i}.ffn_down")
    return norm(x, "output_norm") @ w.get("output.weight", w["token_embd.weight"]).T


def within_window(path: Path) -> int:
    header = values(path)
    return min(20, header[f"{header['general.architecture']}.context_length"])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_by_llama_cpps_conventions_the_file_is_the_model(exported, family):
    directory, path, _ = exported(family)
    tokens = ids(1, within_window(path))
    expected = load_model(directory, dtype=torch.float32)(tokens)[0]
    # Sums in float64 there and in float32 here, as in test_model; frequencies go through a float32 quotient.
    # Observed: 1e-6.
    assert relative_error(torch.from_numpy(logits_of_llama_cpp(path, tokens[0].tolist())), expected) <= 1e-5


def longrope_model(original: int) -> CausalLM:
    config = dict(model_type="llama", vocab_size=V, num_key_value_heads=1, max_position_embeddings=512)
    scaling = LONGROPE | dict(original_max_position_embeddings=original)
    model = CausalLM(parse_config(TINY | config | dict(rope_scaling=scaling))).eval()
    model.init_weights(std=0.3)  # large enough for scores that differ, and tokens without near rivals
    return model.half().float()


@pytest.mark.parametrize("length, factors", [(16, "short"), (24, "long")])
@torch.no_grad()
def test_longrope_is_written_as_two_lists_of_divisors(tmp_path, model_dir, length, factors):
    model, tokens = longrope_model(original=20), ids(1, length)
    notes = write(path := tmp_path / "model.gguf", model, model_dir)
    assert len(notes) == 1 and "llama.cpp chooses LongRoPE's factors by its context (-c)" in notes[0]
    header, written = values(path), tensors(path)
    assert header["llama.rope.scaling.type"] == "longrope" and "llama.rope.scaling.factor" not in header
    assert header["llama.rope.scaling.original_context_length"] == 20
    attention_factor = math.sqrt(1 + math.log(512 / 20) / math.log(20))  # arXiv:2402.13753's code
    assert header["llama.rope.scaling.attn_factor"] == pytest.approx(attention_factor, rel=1e-6)  # float32
    for name in ("short", "long"):
        expected = np.array(LONGROPE[f"{name}_factor"], dtype=np.float32)
        assert np.array_equal(written[f"rope_factors_{name}.weight"], expected)
    found = logits_of_llama_cpp(path, tokens[0].tolist(), factors)
    # As in test_by_llama_cpps_conventions_the_file_is_the_model.
    assert relative_error(torch.from_numpy(found), model(tokens)[0]) <= 1e-5


@given(
    st.integers(1, 4), st.integers(1, 8), st.integers(0, 500), st.integers(0, 500), st.integers(0, 2**32 - 1)
)
def test_scores_of_reordered_heads_under_the_other_pairing_are_the_same(heads, half, here, there, seed):
    K, rng = 2 * half, np.random.default_rng(seed)
    q, k = rng.standard_normal((2, heads * K))
    frequencies = 10000.0 ** (-np.arange(half) / half)
    turns = np.exp(1j * frequencies * here), np.exp(1j * frequencies * there)

    def scores(pairs):  # (heads * K,) -> complex (heads, K/2): the pairs that are turned
        turned_q, turned_k = pairs(q) * turns[0], pairs(k) * turns[1]
        return (turned_q * turned_k.conj()).real.sum(-1)

    def halves(x):
        return x.reshape(heads, 2, half)[:, 0] + 1j * x.reshape(heads, 2, half)[:, 1]

    def neighbours(x):
        dealt = deal_out_halves(torch.from_numpy(x), heads).numpy().reshape(heads, half, 2)
        return dealt[..., 0] + 1j * dealt[..., 1]

    assert np.array_equal(scores(halves), scores(neighbours))


# ---- llama.cpp itself ------------------------------------------------------------------------------------------------


class LlamaCpp:
    """A model in llama.cpp, with a cache of keys and values in float32."""

    def __init__(self, path: Path):
        xllamacpp = pytest.importorskip(
            "xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp"
        )
        options = xllamacpp.CommonParams()
        options.model.path, options.n_ctx, options.n_parallel = str(path), 256, 1
        options.warmup, options.fit_params, options.verbosity, options.cpuparams.n_threads = (
            False,
            False,
            -1,
            1,
        )
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(options)

    def greedy(self, tokens: list[int], count: int) -> tuple[list[int], list[float]]:
        """The next tokens and their log-probabilities. It leaves out those of tokens that are half a
        character.
        """
        settings = {
            "n_predict": count,
            "temperature": 0,
            "ignore_eos": True,
            "return_tokens": True,
            "n_probs": 1,
        }
        answer = self._post("completion", {"prompt": tokens} | settings)
        return answer["tokens"], [step["logprob"] for step in answer["completion_probabilities"]]

    def encode(self, text: str, specials_in_text: bool) -> list[int]:
        return self._post(
            "tokenize", {"content": text, "add_special": True, "parse_special": specials_in_text}
        )["tokens"]

    def _post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(f"{self.server.listening_address}/{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


def assert_generates_the_same(
    path: Path, model: CausalLM, prompt: torch.Tensor, count: int, tolerance: float
) -> None:
    tokens, logprobs = LlamaCpp(path).greedy(prompt[0].tolist(), count)
    expected = generate(model, prompt, max_new_tokens=count, temperature=0.0, eos_token_ids=())
    assert tokens == expected[0, prompt.shape[1] :].tolist()
    here = (
        model(expected)[0, prompt.shape[1] - 1 : -1]
        .log_softmax(-1)
        .gather(1, torch.tensor(tokens)[:, None])[:, 0]
    )
    assert torch.tensor(logprobs).sub(here).abs().max() <= tolerance


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_llama_cpp_generates_the_same_greedy_tokens(exported, ascii_tokenizer, tmp_path, family):
    directory, path, _ = exported(family)
    length = within_window(path)
    export(directory, path := tmp_path / "model.gguf", tokenizer=ascii_tokenizer)
    # It rounds activations to float16 before each product with a float16 matrix: 2^-11 relative, of logits
    # below 5, gathering over 3 layers. Observed: 2e-3.
    assert_generates_the_same(
        path, load_model(directory, dtype=torch.float32), ids(1, length // 2), length - length // 2, 0.02
    )


@pytest.mark.parametrize("original", [256, 8])
@torch.no_grad()
def test_llama_cpp_takes_longropes_factors_by_its_context_and_the_attention_factor(
    tmp_path, ascii_tokenizer, original
):
    model = longrope_model(original)
    write(path := tmp_path / "model.gguf", model, ascii_tokenizer)
    # llama.cpp's context is 256 here: short factors where the original one is too, long ones where it is 8.
    # The tolerance is that of test_llama_cpp_generates_the_same_greedy_tokens.
    assert_generates_the_same(path, model, ids(1, 10), 10, 0.02)


@torch.no_grad()
def test_llama_cpp_runs_a_merged_model_as_minilora_runs_base_and_adapter(merge, place):
    code, out, _ = merge("--adapter", place / "adapter", "--output", place / "merged.gguf")
    assert code == 0 and "merged.gguf holds the merged model, 0 MB" in out
    assert {path.name for path in place.iterdir()} == {"base", "adapter", "merged.gguf"}
    assert_generates_the_same(place / "merged.gguf", adapted(place), ids(1, 10), 10, 0.02)


@torch.no_grad()
def test_llama_cpp_generates_the_same_greedy_tokens_from_the_embedded_model_in_8_bits(tmp_path):
    base = ROOT / "assets" / "base"
    assert export(base, tmp_path / "model.gguf", "q8_0") == []
    assert set(types(tmp_path / "model.gguf").values()) == {Q8_0, F32}
    model = load_model(base, dtype=torch.float32)
    prompt = torch.tensor([load_tokenizer(base).encode("The fox and the owl")])
    # A weight is off by up to 1/254 of the largest of its 32, an activation likewise, without order: 3e-3 of
    # a logit. Observed: 1e-2.
    assert_generates_the_same(tmp_path / "model.gguf", model, prompt, 8, 0.1)


# ---- tokenizers ------------------------------------------------------------------------------------------------------

TEXTS = [
    "",
    " ",
    "the old fox",
    "  two  spaces ",
    "Mr. O'Neil's 1234567 loaves, they'LL say\n\n\tso…\r\n",
    "x" * 40,
]
TEXTS += ["naïve Ünïcode 漢字 кот 🦊🏽 e\u0301 ﬁ", "<0x41> <s>text</s> ▁▁ a▁b", "--- ... ??!! /* */ {}[]()"]
TEXTS += ["snake_case CamelCase camelCase HTTPServer a1b2", "a<think>b <|end|> c"]
hard = st.text(st.sampled_from("abc the's'LL 19½²Ⅷ\n\t\r \u3000.,-_é漢"), max_size=30)
texts = st.sampled_from(TEXTS) | st.text(max_size=30) | hard


def assert_encodes_the_same(tmp_path, tokenizer: Path) -> list[str]:
    """llama.cpp, with a small model and this tokenizer, encodes texts as minilora does. Returns the notes of
    the export.
    """
    model = CausalLM(
        parse_config(dict(model_type="llama", vocab_size=load_tokenizer(tokenizer).vocab_size) | TINY)
    )
    model.init_weights()
    notes = write(tmp_path / "model.gguf", model, tokenizer)
    there, here, is_json = (
        LlamaCpp(tmp_path / "model.gguf"),
        load_tokenizer(tokenizer),
        (tokenizer / "tokenizer.json").exists(),
    )

    @given(texts)
    def check(text):
        assert there.encode(text, specials_in_text=is_json) == here.encode(text)

    check()
    return notes


def test_llama_cpp_encodes_sentencepiece_as_minilora_does(tmp_path, model_dir):
    assert_encodes_the_same(tmp_path, model_dir)


@pytest.fixture
def mistral(tmp_path) -> Path:
    """A directory with the tokenizer of Mistral 7B v0.3."""
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    (tmp_path / "mistral").mkdir()
    shutil.copy(data / "mistral_instruct_tokenizer_240323.model.v3", tmp_path / "mistral" / "tokenizer.model")
    return tmp_path / "mistral"


def test_llama_cpp_encodes_mistrals_own_vocabulary_as_minilora_does(tmp_path, mistral):
    assert assert_encodes_the_same(tmp_path, mistral) == []


def test_llama_cpp_encodes_sentencepiece_in_a_tokenizer_json_as_minilora_does(tmp_path, mistral):
    """Made as Hugging Face makes it: what is joined into a piece, by the pieces' scores."""
    model = SentencePieceProcessor(model_file=str(mistral / "tokenizer.model"))
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    ordinary = [
        piece
        for piece, i in vocab.items()
        if not (model.is_control(i) or model.is_byte(i) or model.is_unknown(i))
    ]
    merges = []
    for piece in sorted(ordinary, key=lambda piece: -model.get_score(vocab[piece])):
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        merges += [(left, right) for left, right in splits if left in vocab and right in vocab]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    prepend, replace = tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.normalizer = tokenizers.normalizers.Sequence([prepend, replace])
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
        + [tokenizers.decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "[INST]"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    (tmp_path / "json").mkdir()
    tokenizer.save(str(tmp_path / "json" / "tokenizer.json"))
    assert assert_encodes_the_same(tmp_path, tmp_path / "json") == []


@pytest.mark.parametrize("steps", _SPLITS, ids=_SPLITS.values())
def test_llama_cpp_splits_texts_into_words_as_each_named_expression_does(tmp_path, steps):
    text = [*TEXTS, *WORDS, "HTTP Server's 123 4567", "Don't they're I'M we'Ve"] * 3
    tokenizer = byte_level_bpe(steps, text, alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    tokenizer.add_tokens(["<think>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert_encodes_the_same(tmp_path, tmp_path)


# ---- merging, and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", ["original", "dequantized"])
def test_the_merged_file_holds_the_tensors_of_the_merged_directory(merge, place, into):
    arguments = ("--adapter", place / "adapter", "--into", into, "--output")
    assert (
        merge(*arguments, place / "merged")[0]
        == merge(*arguments, place / "new" / "merged.gguf", "--outtype", "f16")[0]
        == 0
    )
    shutil.copy(place / "base" / "tokenizer.model", place / "merged")
    export(place / "merged", place / "again" / "merged.gguf")
    assert (place / "new" / "merged.gguf").read_bytes() == (place / "again" / "merged.gguf").read_bytes()
    assert [path.name for path in (place / "new").iterdir()] == ["merged.gguf"]


def test_merging_a_model_with_a_window_prints_the_difference_in_llama_cpp(merge, place, model_dir):
    make_base(place / "windowed", model_dir, family="mistral-window")
    code, out, _ = merge(
        "--adapter", place / "adapter", "--model", place / "windowed", "--output", place / "merged.gguf"
    )
    assert code == 0 and "note: llama.cpp has no sliding window for this model: exact up to 7 tokens" in out


def test_options_that_contradict_the_output_format_are_refused(merge, place):
    for output, option, message in [
        ("merged", ("--outtype", "f16"), "let --output end in .gguf"),
        ("merged.gguf", ("--quantize",), "which no .gguf file holds: leave it out, or choose --outtype q8_0"),
    ]:
        code, _, err = merge("--adapter", place / "adapter", "--output", place / output, *option)
        assert code == 2 and message in err and err.count("\n") == 1 and not (place / output).exists()


def test_without_the_package_the_error_names_it(merge, place, monkeypatch):
    monkeypatch.delitem(sys.modules, "minilora.formats.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, _, err = merge("--adapter", place / "adapter", "--output", place / "merged.gguf")
    assert code == 2 and err.endswith("which is not installed: pip install gguf\n") and err.count("\n") == 1
    assert {path.name for path in place.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="qwen3", attention_bias=True, head_dim=16), "qwen3 has no biases on o_proj"),
        (
            dict(model_type="qwen2", head_dim=20),
            "qwen2 has no 2 heads of size 20 that do not add up to hidden_size 32",
        ),
        (
            dict(model_type="qwen2", rope_scaling=LLAMA3 | {"rope_type": "llama3"}),
            "qwen2 has no rope_scaling of type 'llama3'",
        ),
        (
            dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
            "llama has no rope_scaling of type 'dynamic'",
        ),
        (
            dict(model_type="qwen3", head_dim=16, rope_scaling=LONGROPE),
            "qwen3 has no rope_scaling of type 'longrope'",
        ),
        (
            dict(rope_scaling={"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}),
            "llama has no rope_scaling with other values than beta_fast = 32",
        ),
        (
            dict(rope_scaling={"rope_type": "yarn", "factor": 2.0, "truncate": False}),
            "llama has no rope_scaling with other values than beta_fast = 32",
        ),
        (
            dict(model_type="smollm3", no_rope_layers=[0]),
            "smollm3 has no layers without RoPE other than every fourth",
        ),
        (
            dict(model_type="smollm3", mlp_bias=True),
            "smollm3 has no biases on o_proj or in the feed-forward layers",
        ),
        (dict(vocab_size=100), "tokens, and the model's embedding 100 rows"),
    ],
)
def test_a_model_that_llama_cpp_cannot_express_is_refused_before_anything_is_read(
    tmp_path, model_dir, changes, message
):
    config = parse_config(dict(model_type="llama", vocab_size=V, num_key_value_heads=2) | TINY | changes)
    with pytest.raises(UserError, match=message):
        write_gguf(tmp_path / "model.gguf", model_dir, config, {}, None)
    assert not list(tmp_path.iterdir())


def wrong_tokenizer(directory: Path, kind: str) -> None:
    if kind == "unigram":
        SentencePieceTrainer.train(
            sentence_iterator=iter(WORDS),
            model_prefix=str(directory / "tokenizer"),
            vocab_size=40,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    elif kind == "wordlevel":
        tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(
            str(directory / "tokenizer.json")
        )
    else:
        byte_level_bpe([r"\w+"], WORDS, alphabet=["a"]).save(str(directory / "tokenizer.json"))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("unigram", "is a unigram model"),
        ("wordlevel", "is of type 'WordLevel'"),
        ("split", r"splits texts in a way for which llama.cpp has no name known here \(\\w\+\)"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_form_for_is_refused_by_name(tmp_path, kind, message):
    wrong_tokenizer(tmp_path, kind)
    with pytest.raises(UserError, match=message):
        read_vocabulary(tmp_path, V)


def test_a_tokenizer_that_rewrites_texts_first_is_marked(tmp_path, chat_tokenizer):
    backend = tokenizers.Tokenizer.from_file(str(chat_tokenizer / "tokenizer.json"))
    backend.normalizer = tokenizers.normalizers.NFKC()
    backend.save(str(chat_tokenizer / "tokenizer.json"))
    assert read_vocabulary(chat_tokenizer, V).normalizes


def test_weights_beyond_float16_are_refused_and_fit_8_bits(tmp_path, model_dir):
    model = load_model(model_dir, dtype=torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 1e5
    with pytest.raises(
        UserError, match="blk.1.ffn_up.weight holds weights beyond float16's 65504: choose --outtype q8_0"
    ):
        write(tmp_path / "model.gguf", model, model_dir)
    assert not list(tmp_path.iterdir())
    write(tmp_path / "model.gguf", model, model_dir, "q8_0")
    assert tensors(tmp_path / "model.gguf")["blk.1.ffn_up.weight"][3, 5] == pytest.approx(1e5, rel=2**-10)


@pytest.mark.parametrize(
    "error, raised",
    [
        (OSError("4096 requested and 1024 written"), UserError),  # numpy's own message
        (OSError(errno.ENOSPC, "No space left on device"), OSError),  # one line by `run_script`
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_file_that_cannot_be_finished_leaves_nothing_and_an_old_one_as_it_was(
    tmp_path, model_dir, monkeypatch, error, raised
):
    (tmp_path / "model.gguf").write_text("old")
    written, write_tensor = [], gguf.GGUFWriter.write_tensor_data

    def fail(writer, tensor):
        written.append(tensor)
        if len(written) == 5:
            raise error
        write_tensor(writer, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(raised):
        export(model_dir, tmp_path / "model.gguf")
    assert len(written) == 5
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"model.gguf": "old"}


def test_a_disk_that_is_full_at_the_last_bytes_is_named_and_leaves_nothing(tmp_path, model_dir, monkeypatch):
    close = gguf.GGUFWriter.close

    def fail(writer):
        close(writer)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "close", fail)
    with pytest.raises(OSError, match="No space left") as error:
        export(model_dir, tmp_path / "model.gguf")
    assert error.value.filename == str(tmp_path / "model.gguf") and not list(tmp_path.iterdir())
