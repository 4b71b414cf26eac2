"""Every field of `config.json` that is read, or that must have one value: a table for `config_json.py`.

Defaults are transformers'. Where a family has a default of its own, the meaning says so. The limits lie far
above every published model (Llama 3.1 405B has 126 layers of width 16,384), and a file beyond them is not a
large model but a broken or a hostile one. docs/config_fields.md shows the table.
"""

from minilora.quantization import FLOATS
from minilora.system.schema import Field

MAX_PARAMETERS = 10**13  # of the whole model, by its sizes: five times the largest that was announced
MAX_LAYERS, _MAX_WIDTH, _MAX_HEADS, _MAX_IDS, _MAX_POSITIONS = 10_000, 1_000_000, 100_000, 10_000_000, 2**31


def _size(meaning: str, high: int, **settings) -> Field:
    return Field(int, meaning, low=1, high=high, **settings)


def _token(meaning: str) -> Field:
    return Field(int, meaning, nullable=True, low=-1, high=_MAX_IDS)


def _only(kind: type, *choices: object, meaning: str, **settings) -> Field:
    return Field(kind, meaning, default=choices[0], choices=choices, **settings)


CONFIG_FIELDS = {
    "model_type": Field(
        str, "the family: which flags the decoder has", required=True,
        choices=("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3"),
    ),
    "architectures": Field(list, "none, or the family's own for text generation", nullable=True, longest=100),
    "vocab_size": _size("V, the number of tokens", _MAX_IDS, required=True),
    "hidden_size": _size("D, the width of the model", _MAX_WIDTH, required=True),
    "intermediate_size": _size("F, the width of the feed-forward layer", 10 * _MAX_WIDTH, required=True),
    "num_hidden_layers": _size("the number of layers", MAX_LAYERS, required=True),
    "num_attention_heads": _size("H, the number of query heads", _MAX_HEADS, required=True),
    "num_key_value_heads": _size(
        "G, the number of key and value heads; divides H. null: H. Absent: H for Llama, 8 for Mistral, "
        "32 for Qwen, 4 for SmolLM3", _MAX_HEADS, nullable=True,
    ),
    "head_dim": _size(
        "K, the width of a head; even. Absent or null: 128 for Qwen3, D / H for the others",
        _MAX_HEADS, nullable=True,
    ),
    "max_position_embeddings": _size(
        "the longest context that was trained. Absent: 2048 for Llama, 131072 for Mistral, else 32768",
        _MAX_POSITIONS,
    ),
    "rms_norm_eps": Field(float, "added to the mean of squares in RMSNorm", default=1e-6, low=0, high=1),
    "tie_word_embeddings": Field(
        bool, "the head shares the embedding's weight. Absent: true for SmolLM3, else false"
    ),
    "attention_bias": Field(
        bool, "biases on q, k, v, o of Llama, Qwen3 and SmolLM3. Mistral has none, Qwen2 those of q, k, v: "
        "whatever it says", default=False,
    ),
    "mlp_bias": Field(
        bool, "biases on the feed-forward layers of Llama and SmolLM3; the others have none", default=False
    ),
    "sliding_window": _size(
        "the tokens that a layer sees; null: all. Absent: 4096 for Mistral and Qwen. Llama has none",
        _MAX_POSITIONS, nullable=True,
    ),
    "use_sliding_window": Field(
        bool, "whether layers of Qwen and SmolLM3 have the window at all", default=False
    ),
    "max_window_layers": Field(
        int, "the first of Qwen's layers that has a window, without layer_types", default=28, low=0,
        high=_MAX_POSITIONS,
    ),
    "layer_types": Field(
        list, "full_attention or sliding_attention for each layer; Llama has none. Absent: Mistral's "
        "layers all have the window, Qwen's from max_window_layers on, SmolLM3's where they have no RoPE",
        nullable=True, longest=MAX_LAYERS,
    ),
    "no_rope_layers": Field(
        list, "SmolLM3: 1 for each layer with RoPE, 0 without", nullable=True, items=int, low=0, high=1,
        longest=MAX_LAYERS,
    ),
    "no_rope_layer_interval": _size(
        "SmolLM3, without no_rope_layers: every so many layers, one has no RoPE", MAX_LAYERS, default=4
    ),
    "rope_theta": Field(
        float, "the base of RoPE's wavelengths; null: 10000, for SmolLM3 2000000", nullable=True, low=1,
        high=10**12,
    ),
    "rope_scaling": Field(
        dict, "how RoPE's context is stretched, in the hub's spelling; goes first", nullable=True
    ),
    "rope_parameters": Field(dict, "the same in transformers 5's spelling", nullable=True),
    "original_max_position_embeddings": _size(
        "the same field of rope_scaling or rope_parameters, before which it goes", _MAX_POSITIONS,
        nullable=True,
    ),
    "dtype": Field(str, "of the files, by their own account", nullable=True, choices=tuple(FLOATS)),
    "torch_dtype": Field(str, "the same in the hub's spelling", nullable=True, choices=tuple(FLOATS)),
    "bos_token_id": _token("begin of sequence; -1: none"),
    "eos_token_id": Field(
        (int, list), "end of sequence, one or several; -1: none", nullable=True, items=int, low=-1,
        high=_MAX_IDS, longest=1000,
    ),
    "pad_token_id": _token("padding; -1: none"),
    "auto_map": Field(dict, "the model's own code, which is never run: no entry for a model", nullable=True),
    "quantization_config": Field(dict, "none, or bitsandbytes in 4 or 8 bits", nullable=True),
    "quantization": Field(dict, "none; MLX quantized the files", nullable=True),
    "compression_config": Field(dict, "none; compressed-tensors' older name of the same", nullable=True),
    "hidden_act": _only(str, "silu", "swish", meaning="the activation of the feed-forward layer"),
    "attention_dropout": _only(float, 0.0, nullable=True, meaning="dropout on attention's weights"),
    "partial_rotary_factor": _only(float, 1.0, nullable=True, meaning="the share of a head that is rotated"),
    "rope_interleaved": _only(bool, False, nullable=True, meaning="another order of the rotated pairs"),
    "is_encoder_decoder": _only(bool, False, nullable=True, meaning="an encoder beside the decoder"),
    "add_cross_attention": _only(bool, False, nullable=True, meaning="attention to an encoder"),
    "use_mrope": _only(bool, False, nullable=True, meaning="positions in several dimensions"),
}  # fmt: skip

_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")


def _factor(meaning: str, **settings) -> Field:
    return Field(float, meaning, nullable=True, high=10**6, **settings)


def _factor_list(meaning: str) -> Field:
    return Field(list, meaning, nullable=True, items=float, above=0, high=10**6, longest=_MAX_HEADS)


ROPE_FIELDS = {  # within rope_scaling or rope_parameters
    "rope_type": Field(str, "how the context is stretched", nullable=True, choices=_ROPE_TYPES),
    "type": Field(str, "an older name of rope_type", nullable=True, choices=_ROPE_TYPES),
    "rope_theta": CONFIG_FIELDS["rope_theta"],
    "factor": _factor(
        "linear, llama3, yarn, dynamic: by how much; null: with yarn and longrope the ratio of "
        "max_position_embeddings and original_max_position_embeddings", low=1
    ),
    "low_freq_factor": _factor("llama3: longer wavelengths take the whole factor", above=0),
    "high_freq_factor": _factor("llama3: shorter wavelengths stay; above low_freq_factor", above=0),
    "original_max_position_embeddings": _size(
        "llama3, yarn, longrope: the context before it was stretched; null: max_position_embeddings",
        _MAX_POSITIONS, nullable=True,
    ),
    "beta_fast": _factor("yarn: pairs of more turns in the original context stay; null, 0: 32", low=0),
    "beta_slow": _factor("yarn: pairs of fewer turns take the whole factor; null, 0: 1", low=0),
    "truncate": Field(bool, "yarn: the blend between them begins and ends at whole pairs", default=True),
    "attention_factor": _factor(
        "yarn, longrope: cos and sin are multiplied by it; null: derived from the factor", above=0
    ),
    "mscale": _factor("yarn, with mscale_all_dim: the attention factor is a quotient of two", low=0),
    "mscale_all_dim": _factor("yarn: the weight of the divisor; null, 0: there is none", low=0),
    "short_factor": _factor_list("longrope: divides each pair's frequency within the original context"),
    "long_factor": _factor_list("longrope: the same in longer documents; K / 2 numbers each"),
    "partial_rotary_factor": CONFIG_FIELDS["partial_rotary_factor"],
    "finetuned": Field(bool, "yarn: whether the model was trained so; changes nothing", nullable=True),
}  # fmt: skip

QUANTIZATION_FIELDS = {  # within quantization_config; quantized tensors describe the rest themselves
    "quant_method": Field(str, "who quantized the files", nullable=True, longest=100, one_line=True),
    "load_in_4bit": Field(bool, "4 bits a weight", nullable=True),
    "load_in_8bit": Field(bool, "8 bits a weight", nullable=True),
}

# Bookkeeping: who wrote the file, how to initialise, generate or return. None of it changes the logits, so
# any value is accepted, and none is read.
CHANGES_NOTHING = set(
    """
    transformers_version name_or_path initializer_range use_cache pretraining_tp return_dict torchscript
    output_attentions output_hidden_states id2label label2id num_labels problem_type finetuning_task
    task_specific_params chunk_size_feed_forward use_bfloat16 is_decoder is_llama_config tokenizer_class
    sep_token_id prefix decoder_start_token_id unsloth_fixed unsloth_version transformers.js_config
    model_max_length max_length min_length do_sample num_beams temperature top_k top_p repetition_penalty
    length_penalty no_repeat_ngram_size bad_words_ids early_stopping typical_p num_return_sequences
    diversity_penalty num_beam_groups encoder_no_repeat_ngram_size forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    output_scores return_dict_in_generate tf_legacy_loss pruned_heads tie_encoder_decoder
    cross_attention_hidden_size max_sequence_length
    """.split()
)


def is_off(value: object) -> bool:
    """Whether an unknown field with this value asks for nothing."""
    return value in (None, False, {}, [], "")
