"""The config.json of the best-known Llama, Mistral and Qwen repositories, and of some neighbours.

Public facts, in the hub's spelling, shortened by what is the same in each family. `Repository.refused` holds
words of the line that refuses a file; without it the file is accepted, and the model has `parameters`, the
count that the hub shows for its weights (a tied head counts once), where that is known to the last digit.

    python -m support.hub_models        with tests/ on PYTHONPATH: writes docs/hub_models.md from this table
"""

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "hub_models.md"


@dataclass(frozen=True)
class Repository:
    """What a repository's `config.json` says, and what is to become of it."""

    fields: dict
    refused: str | None = None  # words of the refusal; None: accepted
    accept: tuple[str, ...] = ()  # fields with which accept_config_fields lets it in after all
    parameters: int | None = None


def _sizes(V: int, D: int, F: int, layers: int, heads: int, kv: int | None, positions: int) -> dict:
    sizes = dict(vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=layers)
    sizes |= dict(num_attention_heads=heads, max_position_embeddings=positions)
    return sizes if kv is None else sizes | dict(num_key_value_heads=kv)


def _family(model_type: str, architecture: str, **fields) -> dict:
    common = dict(hidden_act="silu", initializer_range=0.02, use_cache=True, tie_word_embeddings=False)
    return common | dict(model_type=model_type, architectures=[architecture]) | fields


LLAMA = _family("llama", "LlamaForCausalLM", rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
                torch_dtype="float16", pretraining_tp=1, rope_scaling=None)  # fmt: skip
LLAMA_3 = LLAMA | dict(bos_token_id=128000, eos_token_id=128001, attention_bias=False, attention_dropout=0.0,
                       mlp_bias=False, rope_theta=500000.0, torch_dtype="bfloat16")  # fmt: skip
STRETCHED = dict(
    low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192, rope_type="llama3"
)
LLAMA_31, LLAMA_32 = (LLAMA_3 | dict(rope_scaling=STRETCHED | dict(factor=factor)) for factor in (8.0, 32.0))
SEVERAL_ENDS = dict(eos_token_id=[128001, 128008, 128009])
MISTRAL = _family("mistral", "MistralForCausalLM", rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
                  torch_dtype="bfloat16", attention_dropout=0.0, rope_theta=1000000.0, sliding_window=None)  # fmt: skip
QWEN_2 = _family("qwen2", "Qwen2ForCausalLM", rms_norm_eps=1e-6, bos_token_id=151643, eos_token_id=151643,
                 torch_dtype="bfloat16", attention_dropout=0.0, rope_theta=1000000.0,
                 use_sliding_window=False)  # fmt: skip
QWEN_3 = QWEN_2 | dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=128, attention_bias=False,
                       eos_token_id=151645, rope_scaling=None, sliding_window=None)  # fmt: skip

LLAMA_2_7B = LLAMA | _sizes(32000, 4096, 11008, 32, 32, 32, 4096)
LLAMA_31_8B = LLAMA_31 | _sizes(128256, 4096, 14336, 32, 32, 8, 131072)
LLAMA_31_70B = LLAMA_31 | _sizes(128256, 8192, 28672, 80, 64, 8, 131072)
LLAMA_32_1B = (
    LLAMA_32 | _sizes(128256, 2048, 8192, 16, 32, 8, 131072) | dict(head_dim=64, tie_word_embeddings=True)
)
MISTRAL_7B = MISTRAL | _sizes(32000, 4096, 14336, 32, 32, 8, 32768)
MISTRAL_7B_V1 = MISTRAL_7B | dict(rope_theta=10000.0, sliding_window=4096)
QWEN_25_7B = (
    QWEN_2
    | _sizes(152064, 3584, 18944, 28, 28, 4, 131072)
    | dict(max_window_layers=28, sliding_window=131072)
)

BITSANDBYTES = dict(
    _load_in_4bit=True, _load_in_8bit=False, bnb_4bit_compute_dtype="bfloat16", bnb_4bit_quant_storage="uint8",
    bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_enable_fp32_cpu_offload=False,
    llm_int8_has_fp16_weight=False, llm_int8_skip_modules=None, llm_int8_threshold=6.0, load_in_4bit=True,
    load_in_8bit=False, quant_method="bitsandbytes",
)  # fmt: skip


def _unsupported(model_type: str, architecture: str) -> Repository:
    """A model of another family: the sizes do not matter."""
    fields = _family(model_type, architecture) | _sizes(32000, 4096, 14336, 32, 32, 8, 4096)
    return Repository(fields, f"model_type = '{model_type}' is not supported")


REPOSITORIES = {
    # ---- Llama and what was made from it ----
    "huggyllama/llama-7b": Repository(
        LLAMA | _sizes(32000, 4096, 11008, 32, 32, None, 2048)
        | dict(rms_norm_eps=1e-6, pad_token_id=0, max_sequence_length=2048), parameters=6_738_415_616,
    ),
    "meta-llama/Llama-2-7b-hf": Repository(LLAMA_2_7B, parameters=6_738_415_616),
    "meta-llama/Llama-2-13b-hf": Repository(
        LLAMA | _sizes(32000, 5120, 13824, 40, 40, 40, 4096), parameters=13_015_864_320),
    "meta-llama/Llama-2-70b-hf": Repository(
        LLAMA | _sizes(32000, 8192, 28672, 80, 64, 8, 4096), parameters=68_976_648_192),
    "meta-llama/Meta-Llama-3-8B": Repository(
        LLAMA_3 | _sizes(128256, 4096, 14336, 32, 32, 8, 8192), parameters=8_030_261_248),
    "meta-llama/Llama-3.1-8B-Instruct": Repository(LLAMA_31_8B | SEVERAL_ENDS, parameters=8_030_261_248),
    "meta-llama/Llama-3.1-70B": Repository(LLAMA_31_70B, parameters=70_553_706_496),
    "meta-llama/Llama-3.1-405B": Repository(
        LLAMA_31 | _sizes(128256, 16384, 53248, 126, 128, 8, 131072), parameters=405_853_388_800),
    "meta-llama/Llama-3.2-1B": Repository(LLAMA_32_1B, parameters=1_235_814_400),
    "meta-llama/Llama-3.2-3B-Instruct": Repository(
        LLAMA_32 | _sizes(128256, 3072, 8192, 28, 24, 8, 131072) | SEVERAL_ENDS
        | dict(head_dim=128, tie_word_embeddings=True), parameters=3_212_749_824,
    ),
    "meta-llama/Llama-3.3-70B-Instruct": Repository(LLAMA_31_70B | SEVERAL_ENDS, parameters=70_553_706_496),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": Repository(
        LLAMA | _sizes(32000, 2048, 5632, 22, 32, 4, 2048) | dict(torch_dtype="bfloat16", rope_theta=10000.0),
        parameters=1_100_048_384,
    ),
    "HuggingFaceTB/SmolLM-135M": Repository(
        LLAMA | _sizes(49152, 576, 1536, 30, 9, 3, 2048)
        | dict(bos_token_id=0, eos_token_id=0, tie_word_embeddings=True, torch_dtype="float32"),
        parameters=134_515_008,
    ),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": Repository(
        LLAMA | _sizes(49152, 2048, 8192, 24, 32, 32, 8192)
        | dict(tie_word_embeddings=True, torch_dtype="bfloat16", rope_theta=130000, rope_interleaved=False,
               is_llama_config=True, pad_token_id=2, **{"transformers.js_config": {"dtype": "q4"}}),
        parameters=1_711_376_384,
    ),
    "HuggingFaceTB/SmolLM3-3B": Repository(
        _family("smollm3", "SmolLM3ForCausalLM", rms_norm_eps=1e-6, rope_theta=5000000.0, torch_dtype="bfloat16",
                attention_bias=False, mlp_bias=False, layer_types=["full_attention"] * 36, max_window_layers=28,
                no_rope_layers=[1, 1, 1, 0] * 9, no_rope_layer_interval=4, pretraining_tp=2, rope_scaling=None,
                sliding_window=None, use_sliding_window=False, pad_token_id=128004, bos_token_id=128000,
                eos_token_id=128012)
        | _sizes(128256, 2048, 11008, 36, 16, 4, 65536) | dict(tie_word_embeddings=True),
        parameters=3_075_098_624,
    ),
    "lmsys/vicuna-7b-v1.5": Repository(LLAMA_2_7B | dict(pad_token_id=0), parameters=6_738_415_616),
    "lmsys/vicuna-7b-v1.5-16k": Repository(LLAMA_2_7B | dict(rope_scaling=dict(factor=4.0, type="linear"))),
    "Yukang/LongAlpaca-7B": Repository(
        LLAMA | _sizes(32001, 4096, 11008, 32, 32, 32, 4096) | dict(rope_scaling=dict(factor=8.0, type="linear"))),
    "codellama/CodeLlama-7b-hf": Repository(
        LLAMA | _sizes(32016, 4096, 11008, 32, 32, 32, 16384) | dict(rope_theta=1000000, torch_dtype="bfloat16"),
        parameters=6_738_546_688,
    ),
    "NousResearch/Nous-Hermes-Llama2-13b": Repository(
        LLAMA | _sizes(32032, 5120, 13824, 40, 40, 40, 4096) | dict(pad_token_id=0, torch_dtype="bfloat16")),
    "stabilityai/StableBeluga-7B": Repository(LLAMA_2_7B, parameters=6_738_415_616),
    "openlm-research/open_llama_3b_v2": Repository(
        LLAMA | _sizes(32000, 3200, 8640, 26, 32, None, 2048) | dict(rms_norm_eps=1e-6), parameters=3_426_473_600),
    "01-ai/Yi-6B": Repository(
        LLAMA | _sizes(64000, 4096, 11008, 32, 32, 4, 4096)
        | dict(pad_token_id=0, rope_theta=5000000.0, torch_dtype="bfloat16"), parameters=6_061_035_520,
    ),
    "deepseek-ai/deepseek-llm-7b-base": Repository(
        LLAMA | _sizes(102400, 4096, 11008, 30, 32, 32, 4096)
        | dict(rms_norm_eps=1e-6, bos_token_id=100000, eos_token_id=100001, torch_dtype="bfloat16"),
        parameters=6_910_365_696,
    ),
    "deepseek-ai/deepseek-coder-6.7b-base": Repository(
        LLAMA | _sizes(32256, 4096, 11008, 32, 32, 32, 16384)
        | dict(rms_norm_eps=1e-6, bos_token_id=32013, eos_token_id=32014, rope_theta=100000,
               rope_scaling=dict(factor=4.0, type="linear"), torch_dtype="bfloat16"), parameters=6_740_512_768,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": Repository(LLAMA_31_8B, parameters=8_030_261_248),
    "upstage/SOLAR-10.7B-v1.0": Repository(
        LLAMA | _sizes(32000, 4096, 14336, 48, 32, 8, 4096) | dict(rope_theta=10000.0), parameters=10_731_524_096),
    "nvidia/Llama-3.1-Minitron-4B-Width-Base": Repository(
        LLAMA_31 | _sizes(128256, 3072, 9216, 32, 32, 8, 131072) | dict(head_dim=128)),
    "nvidia/Llama-3.1-Nemotron-70B-Instruct-HF": Repository(LLAMA_31_70B | SEVERAL_ENDS),
    "NousResearch/Hermes-3-Llama-3.1-8B": Repository(LLAMA_31_8B | dict(eos_token_id=128040)),
    "gradientai/Llama-3-8B-Instruct-Gradient-1048k": Repository(
        LLAMA_3 | _sizes(128256, 4096, 14336, 32, 32, 8, 1048576) | dict(rope_theta=3580165449.0)),
    "unsloth/Llama-3.2-1B-Instruct": Repository(
        LLAMA_32_1B | SEVERAL_ENDS | dict(pad_token_id=128004, unsloth_fixed=True), parameters=1_235_814_400),
    "unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit": Repository(
        LLAMA_32_1B | dict(pad_token_id=128004, unsloth_fixed=True)
        | dict(quantization_config=BITSANDBYTES | dict(
            llm_int8_skip_modules=["lm_head", "multi_modal_projector", "model.layers.1.mlp"]))),
    "unsloth/phi-4": Repository(
        LLAMA | _sizes(100352, 5120, 17920, 40, 40, 10, 16384)
        | dict(bos_token_id=100257, eos_token_id=100265, pad_token_id=100351, rope_theta=250000,
               torch_dtype="bfloat16", unsloth_fixed=True), parameters=14_659_507_200,
    ),
    # ---- Mistral ----
    "mistralai/Mistral-7B-v0.1": Repository(MISTRAL_7B_V1, parameters=7_241_732_096),
    "mistralai/Mistral-7B-Instruct-v0.2": Repository(MISTRAL_7B, parameters=7_241_732_096),
    "mistralai/Mistral-7B-v0.3": Repository(
        MISTRAL_7B | dict(vocab_size=32768, head_dim=128), parameters=7_248_023_552),
    "mistralai/Mistral-Nemo-Base-2407": Repository(
        MISTRAL | _sizes(131072, 5120, 14336, 40, 32, 8, 128000) | dict(head_dim=128), parameters=12_247_782_400),
    "mistralai/Mistral-Small-24B-Instruct-2501": Repository(
        MISTRAL | _sizes(131072, 5120, 32768, 40, 32, 8, 32768) | dict(head_dim=128, rope_theta=100000000.0),
        parameters=23_572_403_200,
    ),
    "mistralai/Mistral-Large-Instruct-2407": Repository(
        MISTRAL | _sizes(32768, 12288, 28672, 88, 96, 8, 131072) | dict(head_dim=128), parameters=122_610_069_504),
    "mistralai/Ministral-8B-Instruct-2410": Repository(
        MISTRAL | _sizes(131072, 4096, 12288, 36, 32, 8, 32768)
        | dict(head_dim=128, rope_theta=100000000.0, sliding_window=32768), parameters=8_019_808_256,
    ),
    "HuggingFaceH4/zephyr-7b-beta": Repository(MISTRAL_7B_V1 | dict(pad_token_id=2), parameters=7_241_732_096),
    "teknium/OpenHermes-2.5-Mistral-7B": Repository(
        MISTRAL_7B_V1 | dict(vocab_size=32002, eos_token_id=32000, use_cache=False), parameters=7_241_748_480),
    "cognitivecomputations/dolphin-2.6-mistral-7b": Repository(
        MISTRAL_7B_V1 | dict(vocab_size=32001, eos_token_id=32000, use_cache=False)),
    # ---- Qwen ----
    "Qwen/Qwen1.5-0.5B": Repository(
        QWEN_2 | _sizes(151936, 1024, 2816, 24, 16, 16, 32768)
        | dict(max_window_layers=21, sliding_window=32768, tie_word_embeddings=True), parameters=463_987_712,
    ),
    "Qwen/Qwen2-0.5B": Repository(
        QWEN_2 | _sizes(151936, 896, 4864, 24, 14, 2, 131072)
        | dict(max_window_layers=24, sliding_window=131072, tie_word_embeddings=True), parameters=494_032_768,
    ),
    "Qwen/Qwen2.5-1.5B": Repository(
        QWEN_2 | _sizes(151936, 1536, 8960, 28, 12, 2, 131072)
        | dict(max_window_layers=28, sliding_window=131072, use_mrope=False, tie_word_embeddings=True),
        parameters=1_543_714_304,
    ),
    "Qwen/Qwen2.5-7B": Repository(QWEN_25_7B | dict(use_mrope=False), parameters=7_615_616_512),
    "Qwen/Qwen2.5-7B-Instruct, with yarn as its card says": Repository(
        QWEN_25_7B | dict(eos_token_id=151645, max_position_embeddings=32768, rope_scaling=dict(
            factor=4.0, original_max_position_embeddings=32768, type="yarn"))),
    "Qwen/Qwen2.5-7B-Instruct-1M": Repository(
        QWEN_25_7B | dict(max_position_embeddings=1010000, sliding_window=1010000, rope_theta=10000000.0,
                          dual_chunk_attention_config=dict(
                              chunk_size=262144, local_size=8192, original_max_position_embeddings=262144)),
        "unknown field dual_chunk_attention_config", accept=("dual_chunk_attention_config",),
        parameters=7_615_616_512,
    ),
    "Qwen/QwQ-32B": Repository(
        QWEN_2 | _sizes(152064, 5120, 27648, 64, 40, 8, 40960) | dict(max_window_layers=64, sliding_window=32768),
        parameters=32_763_876_352,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": Repository(
        QWEN_2 | _sizes(151936, 1536, 8960, 28, 12, 2, 131072)
        | dict(max_window_layers=21, sliding_window=4096, rope_theta=10000, use_mrope=False),
        parameters=1_777_088_000,
    ),
    "Qwen/Qwen3-0.6B": Repository(
        QWEN_3 | _sizes(151936, 1024, 3072, 28, 16, 8, 40960) | dict(max_window_layers=28, tie_word_embeddings=True),
        parameters=596_049_920,
    ),
    "Qwen/Qwen3-8B": Repository(
        QWEN_3 | _sizes(151936, 4096, 12288, 36, 32, 8, 40960) | dict(max_window_layers=36),
        parameters=8_190_735_360,
    ),
    "Qwen/Qwen3-4B-Instruct-2507": Repository(
        QWEN_3 | _sizes(151936, 2560, 9728, 36, 32, 8, 262144)
        | dict(max_window_layers=36, rope_theta=5000000, tie_word_embeddings=True), parameters=4_022_468_096,
    ),
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": Repository(  # transformers reads past attn_factor, vLLM does not
        QWEN_3 | _sizes(151936, 4096, 12288, 36, 32, 8, 131072)
        | dict(max_window_layers=36, rope_scaling=dict(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=32768, attn_factor=0.8782488562869419)),
        "rope_scaling.attn_factor",
    ),
    # ---- refused: their own code ----
    "NousResearch/Yarn-Mistral-7b-128k": Repository(
        MISTRAL_7B_V1 | dict(
            rope_scaling=dict(factor=16.0, finetuned=True, original_max_position_embeddings=8192, type="yarn"),
            auto_map=dict(AutoModelForCausalLM="modeling_mistral_yarn.MistralForCausalLM")),
        "auto_map asks for the model's own code",
    ),
    "togethercomputer/LLaMA-2-7B-32K": Repository(
        LLAMA_2_7B | dict(rope_scaling=dict(factor=8.0, type="linear"), max_position_embeddings=32768,
                          auto_map=dict(AutoModelForCausalLM="modeling_flash_llama.LlamaForCausalLM")),
        "auto_map asks for the model's own code",
    ),
    # ---- refused: quantized in a format that is not read ----
    "TheBloke/Llama-2-7B-Chat-GPTQ": Repository(
        LLAMA_2_7B | dict(quantization_config=dict(
            bits=4, group_size=128, damp_percent=0.1, desc_act=False, sym=True, quant_method="gptq")),
        "quantization_config is of GPTQ",
    ),
    "TheBloke/Mistral-7B-Instruct-v0.2-AWQ": Repository(
        MISTRAL_7B | dict(quantization_config=dict(
            bits=4, group_size=128, quant_method="awq", version="gemm", zero_point=True)),
        "quantization_config is of AWQ",
    ),
    "Qwen/Qwen3-8B-FP8": Repository(
        QWEN_3 | _sizes(151936, 4096, 12288, 36, 32, 8, 40960) | dict(quantization_config=dict(
            activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128])),
        "quantization_config is of FP8 in blocks",
    ),
    "RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16": Repository(
        LLAMA_31_8B | dict(quantization_config=dict(format="pack-quantized", quant_method="compressed-tensors")),
        "quantization_config is of compressed-tensors",
    ),
    "mlx-community/Llama-3.2-1B-Instruct-4bit": Repository(
        LLAMA_32_1B | dict(quantization=dict(group_size=64, bits=4)), "quantization is of MLX"),
    # ---- refused: another decoder ----
    "meta-llama/Llama-4-Scout-17B-16E": _unsupported("llama4", "Llama4ForConditionalGeneration"),
    "nvidia/Llama-3_1-Nemotron-51B-Instruct": _unsupported("nemotron-nas", "DeciLMForCausalLM"),
    "mistralai/Mixtral-8x7B-v0.1": _unsupported("mixtral", "MixtralForCausalLM"),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": _unsupported("mistral3", "Mistral3ForConditionalGeneration"),
    "Qwen/Qwen-7B": _unsupported("qwen", "QWenLMHeadModel"),
    "Qwen/Qwen3-30B-A3B": _unsupported("qwen3_moe", "Qwen3MoeForCausalLM"),
    "Qwen/Qwen2.5-VL-7B-Instruct": _unsupported("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    "microsoft/Phi-3-mini-4k-instruct": _unsupported("phi3", "Phi3ForCausalLM"),
    "google/gemma-2-9b": _unsupported("gemma2", "Gemma2ForCausalLM"),
    "deepseek-ai/DeepSeek-V3": _unsupported("deepseek_v3", "DeepseekV3ForCausalLM"),
    "ibm-granite/granite-3.3-8b-instruct": _unsupported("granite", "GraniteForCausalLM"),
}  # fmt: skip


def page() -> str:
    """docs/hub_models.md."""
    lines = [
        "# The best-known repositories, and what becomes of their config.json", "",
        "Each accepted file is read as transformers reads it. `tests/formats/test_hub_models.py` compares heads, windows,",
        "RoPE, ties and tokens with transformers' own configuration, and the number of parameters with the hub's.",
        "`python -m support.hub_models` writes this page from the table of that test (`tests/` must be on PYTHONPATH).", "",
        "| repository | parameters | `config.json` |", "|---|---:|---|",
    ]  # fmt: skip
    for name, repository in REPOSITORIES.items():
        count = f"{repository.parameters:,}" if repository.parameters else ""
        verdict = f"refused: {repository.refused}" if repository.refused else "accepted"
        if repository.accept:
            verdict += f"; accepted with `accept_config_fields: {', '.join(repository.accept)}`"
        lines.append(f"| {name} | {count} | {verdict} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")
