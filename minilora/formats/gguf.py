"""A model as one GGUF file, for llama.cpp and the programs built on it (Ollama, LM Studio, ...).

The file is a header of typed keys and values, a table of tensors, and their bytes. The `gguf` package lays it
out. This file translates the model into llama.cpp's terms:

    names      model.layers.0.self_attn.q_proj.weight  ->  blk.0.attn_q.weight
    matrices   f16, or q8_0: for every 32 weights of a row d = max |w| / 127 in float16 and round(w / d) in
               int8, 8.5 bits a weight. A matrix whose rows are no multiple of 32 long stays f16.
    vectors    norms and biases, always float32
    q and k    RoPE turns pairs of dimensions of each head. Hugging Face, and minilora, pair (i, i + K/2).
               llama.cpp's architecture `llama`, which is Llama's and Mistral's, pairs (2i, 2i + 1), and so
               does `smollm3`. So the rows of every head are taken in turn from its two halves. Queries and
               keys are reordered alike, so their scores do not change. `qwen2` and `qwen3` pair
               (i, i + K/2): no row moves.
    RoPE       linear: a factor. llama3: rope_freqs.weight (K/2,), by which llama.cpp divides every frequency.
               yarn: a factor; llama.cpp multiplies cos and sin by 1 + 0.1 ln(factor) of its own accord, and
               attn_factor is what remains. longrope: rope_factors_short.weight and
               rope_factors_long.weight (K/2,)
    tied head  not written: llama.cpp takes the embedding

Memory holds one tensor at a time, and the file appears complete or not at all. A model that llama.cpp cannot
express is refused by name: llama.cpp's code does not add some biases, for example. Differences that remain
are returned as sentences, for the caller to print.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minilora.config import ModelConfig, RopeConfig
from minilora.data.chat import answer_end
from minilora.data.tokenizer import Tokenizer, load_tokenizer
from minilora.formats.gguf_vocabulary import CONTROL, Vocabulary, read_vocabulary
from minilora.rope import rope_frequencies, yarn_attention_factor
from minilora.system.errors import UserError
from minilora.system.outputs import whole_output

try:
    import gguf
    from gguf import GGMLQuantizationType as Type
except ImportError as error:
    raise UserError(
        "a .gguf file is written with the gguf package, which is not installed: pip install gguf"
    ) from error

_ARCHITECTURES = dict(llama="llama", mistral="llama", ministral="llama", qwen2="qwen2", qwen3="qwen3")
_ARCHITECTURES |= dict(smollm3="smollm3")
_PAIRS_NEIGHBOURS = ("llama", "smollm3")  # architectures whose RoPE turns the pairs (2i, 2i + 1)
_ROWS = 4096  # rows of a matrix that are converted at a time


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file, before it is read."""

    shape: tuple[int, ...]
    type: Type
    source: str | None  # Hugging Face's name; None: `values` holds the tensor
    heads: int | None = None  # the rows of so many heads are reordered
    values: Tensor | None = None


def write_gguf(
    path: Path,
    directory: Path,
    config: ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    outtype: str = "f16",
) -> list[str]:
    """Write a model as a GGUF file. Returns one sentence for each difference in llama.cpp.

    directory: holds the tokenizer. shapes: of all tensors, by Hugging Face's names. read: returns a tensor by
    its name. Raises UserError, before the first tensor is read, for a model or a tokenizer that llama.cpp has
    no form for.
    """
    architecture = _ARCHITECTURES[config.model_type]
    _refuse_inexpressible(config, architecture)
    tokenizer, vocabulary = load_tokenizer(directory), read_vocabulary(directory, config.vocab_size)
    entries = _entries(architecture, config, shapes, outtype)
    with whole_output("output", path) as part:
        writer = gguf.GGUFWriter(part, architecture)
        try:
            _add_file(writer, path.stem, outtype)
            _add_model(writer, config)
            _add_vocabulary(writer, vocabulary, tokenizer, config)
            if tokenizer.chat_template is not None:
                writer.add_chat_template(tokenizer.chat_template)
            _write_tensors(writer, entries, read)
            writer.close()
        except OSError as error:
            if error.errno is None:  # numpy's own message, which forgets the reason
                raise UserError(f"{path} cannot be written: {error}; is the disk full?") from error
            error.filename, error.filename2 = str(path), None
            raise
        finally:
            with suppress(OSError):  # Buffered bytes meet the same full disk again.
                writer.close()
    return _differences(config, vocabulary, entries, outtype)


def _refuse_inexpressible(config: ModelConfig, architecture: str) -> None:
    """Raise UserError for a model that needs more than llama.cpp's code for its architecture computes."""
    heads, size, width = config.num_attention_heads, config.head_dim, config.hidden_size
    rope, problem = config.rope, None
    every_fourth = tuple((i + 1) % 4 != 0 for i in range(config.num_hidden_layers))
    if architecture != "llama" and (config.o_bias or config.mlp_bias):
        problem = "biases on o_proj or in the feed-forward layers"
    elif rope.rope_type == "dynamic" or (
        rope.rope_type in ("llama3", "longrope") and architecture != "llama"
    ):
        problem = f"rope_scaling of type {rope.rope_type!r}"
    elif rope.rope_type == "yarn" and (rope.beta_fast, rope.beta_slow, rope.truncate) != (32.0, 1.0, True):
        problem = "rope_scaling with other values than beta_fast = 32, beta_slow = 1, truncate = true"
    elif config.layer_rope not in ((), every_fourth):
        problem = "layers without RoPE other than every fourth"
    elif architecture in ("qwen2", "smollm3") and heads * size != width:
        problem = f"{heads} heads of size {size} that do not add up to hidden_size {width}"
    if problem:
        raise UserError(
            f"llama.cpp's {architecture} has no {problem}: "
            "this model cannot be a .gguf file; write a directory"
        )


# ---- the tensors ----


def _entries(
    architecture: str, config: ModelConfig, shapes: dict[str, tuple[int, ...]], outtype: str
) -> dict[str, _Entry]:
    """llama.cpp's name -> entry, of all tensors of the file."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    reordered = {}
    if architecture in _PAIRS_NEIGHBOURS:
        reordered = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    entries = {
        name: _Entry(tuple(divisors.shape), Type.F32, None, values=divisors)
        for name, divisors in _frequency_divisors(config).items()
    }
    for source, shape in shapes.items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        heads = reordered.get(source.split(".")[-2])
        entries[name] = _Entry(shape, _type(shape, outtype), source, heads)
    return entries


def _frequency_divisors(config: ModelConfig) -> dict[str, Tensor]:
    """llama.cpp's name -> the numbers by which it divides every frequency, (K/2,)."""
    rope = config.rope
    if rope.rope_type == "llama3":
        unstretched = rope_frequencies(replace(rope, rope_type="default"), config.head_dim)
        return {"rope_freqs.weight": unstretched / rope_frequencies(rope, config.head_dim)}
    if rope.rope_type == "longrope":
        lists = {"short": rope.short_factor, "long": rope.long_factor}
        return {f"rope_factors_{name}.weight": torch.tensor(factors) for name, factors in lists.items()}
    return {}


def _type(shape: tuple[int, ...], outtype: str) -> Type:
    if len(shape) == 1:
        return Type.F32
    whole_blocks = shape[-1] % gguf.GGML_QUANT_SIZES[Type.Q8_0][0] == 0
    return Type.Q8_0 if outtype == "q8_0" and whole_blocks else Type.F16


def _write_tensors(
    writer: gguf.GGUFWriter, entries: dict[str, _Entry], read: Callable[[str], Tensor]
) -> None:
    """Write the header and the table of tensors, then the tensors one at a time."""
    for name, entry in entries.items():
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[entry.type]
        size = math.prod(entry.shape) // per_block * block_bytes
        writer.add_tensor_info(name, entry.shape, None, size, raw_dtype=entry.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, entry in tqdm(entries.items(), unit=" tensors", leave=False, disable=None):
        tensor = read(entry.source) if entry.values is None else entry.values
        if entry.heads is not None:
            tensor = deal_out_halves(tensor, entry.heads)
        writer.write_tensor_data(_converted(tensor, entry.type, name))


def deal_out_halves(weight: Tensor, heads: int) -> Tensor:
    """(heads * K, ...) with the rows of every head in the order 0, K/2, 1, K/2 + 1, ..., K/2 - 1, K - 1."""
    halves = weight.unflatten(0, (heads, 2, -1))  # (heads, 2, K/2, ...)
    return halves.transpose(1, 2).reshape(weight.shape)


def _converted(tensor: Tensor, target: Type, name: str) -> np.ndarray:
    """A tensor's values, or its q8_0 blocks, as the file holds them."""
    if target == Type.F32:
        return tensor.float().contiguous().numpy()
    if target == Type.F16:
        half = tensor.to(torch.float16)
        if not half.isfinite().all():
            raise UserError(f"{name} holds weights beyond float16's 65504: choose --outtype q8_0")
        return half.contiguous().numpy()
    pieces = (rows.float().contiguous().numpy() for rows in tensor.split(_ROWS))
    return np.concatenate([gguf.quants.quantize(rows, target) for rows in pieces])


# ---- the header ----


def _add_file(writer: gguf.GGUFWriter, name: str, outtype: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{outtype.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_model(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """The shape of the model, under keys that begin with its architecture."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    _add_rope_scaling(writer, config.rope)


def _add_rope_scaling(writer: gguf.GGUFWriter, rope: RopeConfig) -> None:
    if rope.rope_type not in ("linear", "yarn", "longrope"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType[rope.rope_type.upper()])
    if rope.rope_type != "longrope":
        writer.add_rope_scaling_factor(rope.factor)
    if rope.rope_type == "linear":
        return
    writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
    its_own = yarn_attention_factor(rope.factor) if rope.rope_type == "yarn" else 1.0
    writer.add_rope_scaling_attn_factors(rope.attention_factor / its_own)


def _context_length(config: ModelConfig) -> int:
    """The tokens up to which llama.cpp is exact: it has no sliding window for these architectures."""
    windows = [window for window in config.layer_windows if window is not None]
    return min([config.max_position_embeddings, *windows])


def _add_vocabulary(
    writer: gguf.GGUFWriter, vocabulary: Vocabulary, tokenizer: Tokenizer, config: ModelConfig
) -> None:
    """The tokens, their types and scores or merges, and the ids of the tokens with a role."""
    ends = dict.fromkeys((answer_end(tokenizer), *config.eos_token_ids))  # a set in order
    ends = [i for i in ends if i not in (None, tokenizer.eos_id)]
    special = {tokenizer.bos_id, tokenizer.eos_id, *ends}
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([CONTROL if i in special else t for i, t in enumerate(vocabulary.types)])
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    else:
        writer.add_token_merges(vocabulary.merges)
    roles = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "eot": next(iter(ends), None),
        "unk": vocabulary.unknown_id,
        "pad": tokenizer.pad_id,
    }
    for role, i in roles.items():
        if i is not None:
            getattr(writer, f"add_{role}_token_id")(i)
    writer.add_add_bos_token(tokenizer.encode("") == [tokenizer.bos_id])
    writer.add_add_eos_token(False)


def _differences(
    config: ModelConfig, vocabulary: Vocabulary, entries: dict[str, _Entry], outtype: str
) -> list[str]:
    """One sentence for each way in which llama.cpp will differ from the model as it was trained."""
    differences = []
    if (context := _context_length(config)) < config.max_position_embeddings:
        differences.append(
            "llama.cpp has no sliding window for this model: "
            f"exact up to {context} tokens, the context length written"
        )
    if config.rope.rope_type == "longrope":
        original = config.rope.original_max_position_embeddings
        differences.append(
            "llama.cpp chooses LongRoPE's factors by its context (-c), not by each text's length: "
            f"texts of up to {original} tokens are exact where -c is at most {original}, longer ones always"
        )
    if vocabulary.normalizes:
        differences.append(
            "this tokenizer normalizes texts first, and llama.cpp does not: "
            "unusual Unicode may become other tokens"
        )
    wide = [name for name, entry in entries.items() if entry.type == Type.F16]
    if outtype == "q8_0" and wide:
        differences.append(
            f"rows that are no multiple of 32 long stay f16: {len(wide)} matrices, {wide[0]} among them"
        )
    return differences
