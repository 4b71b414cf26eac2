"""A model as one GGUF file, which llama.cpp and what is built on it (Ollama, LM Studio, ...) run.

The file is a header of typed keys and values, a table of tensors, and their bytes; the `gguf` package lays it
out. What the model means must be said in llama.cpp's terms:

    names      model.layers.0.self_attn.q_proj.weight  ->  blk.0.attn_q.weight
    matrices   f16, or q8_0: for every 32 weights of a row d = max |w| / 127 in float16 and round(w / d) in int8, 8.5 bits a
               weight. Rows that are no multiple of 32 stay f16
    vectors    norms and biases, always float32
    q and k    of the architecture `llama`, which is Llama's and Mistral's. RoPE turns pairs of dimensions of each head: in Hugging
               Face's files, as here, (i, i + K/2); in llama.cpp's `llama` (2i, 2i + 1). So the rows of every
               head are dealt out in turn from its two halves, and scores of queries with keys, which are both
               reordered alike, stay as they are. Its `qwen2` and `qwen3` turn the pairs (i, i + K/2), and
               nothing is moved
    RoPE       linear: a factor. llama3: rope_freqs.weight (K/2,), by which llama.cpp divides every frequency
    tied head  not written: llama.cpp takes the embedding

One tensor passes at a time, and the file appears whole or not at all. What llama.cpp cannot express (biases
that its code does not add, say) is refused by name; what it does otherwise is returned in sentences, for the
caller to print.
"""

import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minilora.config import ModelConfig
from minilora.data.chat import answer_end
from minilora.data.tokenizer import Tokenizer, load_tokenizer
from minilora.formats.gguf_vocabulary import CONTROL, Vocabulary, read_vocabulary
from minilora.model import rope_frequencies
from minilora.system.errors import UserError

try:
    import gguf
except ImportError as error:
    raise UserError(
        "a .gguf file is written with the gguf package, which is not installed: pip install gguf"
    ) from error

OUTTYPES = ("f16", "q8_0")
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_ROWS = 4096  # of a matrix are converted at a time


def write_gguf(
    path: Path,
    directory: Path,
    config: ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    outtype: str = "f16",
) -> list[str]:
    """Write a model as a GGUF file. Returns what llama.cpp will do otherwise than the model was trained, a
    sentence each.

    directory: where its tokenizer lies. shapes: of all its tensors, by Hugging Face's names. read: one of
    them, by its name. Raises UserError, before the first tensor is read, for a model or a tokenizer that
    llama.cpp has no form for.
    """
    architecture = _ARCHITECTURES[config.model_type]
    _refuse_inexpressible(config, architecture)
    tokenizer, vocabulary = load_tokenizer(directory), read_vocabulary(directory, config.vocab_size)
    tensors = _tensors(architecture, config, shapes, read, outtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, architecture)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(path.stem)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{outtype.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_model(writer, config, architecture)
        _add_vocabulary(writer, vocabulary, tokenizer, config)
        if tokenizer.chat_template is not None:
            writer.add_chat_template(tokenizer.chat_template)
        for name, (shape, kind, _) in tensors.items():
            per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            writer.add_tensor_info(
                name, shape, None, math.prod(shape) // per_block * block_bytes, raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (_, kind, get) in tqdm(tensors.items(), unit=" tensors", leave=False, disable=None):
            writer.write_tensor_data(_converted(get(), kind, name))
        writer.close()
        os.replace(part, path)
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None
            raise
        raise UserError(
            f"{path} cannot be written: {error}; is the disk full?"
        ) from error  # numpy forgets the reason
    finally:
        with suppress(OSError):  # what is buffered still finds the disk as full
            writer.close()
        part.unlink(missing_ok=True)
    return _differences(config, vocabulary, tensors, outtype)


def _refuse_inexpressible(config: ModelConfig, architecture: str) -> None:
    """llama.cpp's code for an architecture is fixed: what a file asks for beyond it does not load, or is not
    done.
    """
    heads, size, width = config.num_attention_heads, config.head_dim, config.hidden_size
    problem = None
    if architecture != "llama" and (config.o_bias or config.mlp_bias):
        problem = "biases on o_proj or in the feed-forward layers"
    elif architecture != "llama" and config.rope.rope_type == "llama3":
        problem = "rope_scaling of type 'llama3'"
    elif architecture == "qwen2" and heads * size != width:
        problem = f"{heads} heads of size {size} that do not add up to hidden_size {width}"
    if problem:
        raise UserError(
            f"llama.cpp's {architecture} has no {problem}: this model cannot be a .gguf file; write a directory"
        )


def _tensors(
    architecture: str, config: ModelConfig, shapes: dict, read: Callable, outtype: str
) -> dict[str, tuple]:
    """GGUF's name -> (shape, type, how to get it), of all tensors of the file."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    kinds = gguf.GGMLQuantizationType
    heads = (
        {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if architecture == "llama"
        else {}
    )
    tensors = {}
    if config.rope.rope_type == "llama3":
        unstretched = rope_frequencies(replace(config.rope, rope_type="default"), config.head_dim)
        divisors = unstretched / rope_frequencies(config.rope, config.head_dim)  # (K/2,)
        tensors["rope_freqs.weight"] = (tuple(divisors.shape), kinds.F32, lambda: divisors)
    for name, shape in shapes.items():
        matrix = (
            kinds.Q8_0
            if outtype == "q8_0" and shape[-1] % gguf.GGML_QUANT_SIZES[kinds.Q8_0][0] == 0
            else kinds.F16
        )
        count = heads.get(name.split(".")[-2])

        def get(name=name, count=count) -> Tensor:
            return read(name) if count is None else deal_out_halves(read(name), count)

        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = (
            shape,
            matrix if len(shape) > 1 else kinds.F32,
            get,
        )
    return tensors


def deal_out_halves(weight: Tensor, heads: int) -> Tensor:
    """(heads * K, ...) with the rows of every head reordered from 0, 1, ..., K - 1 to 0, K/2, 1, K/2 + 1,
    ..., K/2 - 1, K - 1.
    """
    halves = weight.unflatten(0, (heads, 2, -1))  # (heads, 2, K/2, ...)
    return halves.transpose(1, 2).reshape(weight.shape)


def _converted(tensor: Tensor, kind: gguf.GGMLQuantizationType, name: str) -> np.ndarray:
    """A tensor as it lies in the file."""
    if kind == gguf.GGMLQuantizationType.F32:
        return tensor.float().contiguous().numpy()
    if kind == gguf.GGMLQuantizationType.F16:
        half = tensor.to(torch.float16)
        if not half.isfinite().all():
            raise UserError(f"{name} holds weights beyond float16's 65504: choose --outtype q8_0")
        return half.contiguous().numpy()
    blocks = [
        torch.from_numpy(gguf.quants.quantize(rows.float().contiguous().numpy(), kind))
        for rows in tensor.split(_ROWS)
    ]
    return torch.cat(blocks).numpy()


def _add_model(writer: gguf.GGUFWriter, config: ModelConfig, architecture: str) -> None:
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
    if config.rope.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope.factor)


def _context_length(config: ModelConfig) -> int:
    """As far as llama.cpp, which has no sliding window for these architectures, computes what the model was
    trained to.
    """
    return min(
        [config.max_position_embeddings, *(window for window in config.layer_windows if window is not None)]
    )


def _add_vocabulary(
    writer: gguf.GGUFWriter, vocabulary: Vocabulary, tokenizer: Tokenizer, config: ModelConfig
) -> None:
    ends = [
        i
        for i in dict.fromkeys((answer_end(tokenizer), *config.eos_token_ids))
        if i not in (None, tokenizer.eos_id)
    ]
    special = {tokenizer.bos_id, tokenizer.eos_id, *ends}
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([CONTROL if i in special else kind for i, kind in enumerate(vocabulary.types)])
    if vocabulary.kind == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    else:
        writer.add_token_merges(vocabulary.merges)
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "eot": next(iter(ends), None),
        "unk": vocabulary.unknown_id,
    }
    for role, i in (ids | {"pad": tokenizer.pad_id}).items():
        if i is not None:
            getattr(writer, f"add_{role}_token_id")(i)
    writer.add_add_bos_token(tokenizer.encode("") == [tokenizer.bos_id])
    writer.add_add_eos_token(False)


def _differences(config: ModelConfig, vocabulary: Vocabulary, tensors: dict, outtype: str) -> list[str]:
    found = []
    if (context := _context_length(config)) < config.max_position_embeddings:
        found.append(
            f"llama.cpp has no sliding window for this model: exact up to {context} tokens, the context length written"
        )
    if vocabulary.normalizes:
        found.append(
            "this tokenizer normalizes texts first, and llama.cpp does not: unusual Unicode may become other tokens"
        )
    wide = [
        name
        for name, (shape, kind, _) in tensors.items()
        if len(shape) > 1 and kind == gguf.GGMLQuantizationType.F16
    ]
    if outtype == "q8_0" and wide:
        found.append(
            f"rows that are no multiple of 32 long stay f16: {len(wide)} matrices, {wide[0]} among them"
        )
    return found
