"""adapter_config.json as the versions of PEFT, and trainers on it, write it: taken, or refused for its reason."""

import pytest

from minilora import UserError
from minilora.adapters.file import parse_adapter_config

# What each version added to the keys of the one before, with the values that a plain LoRA gets.
_FIRST = dict(
    base_model_name_or_path="huggyllama/llama-7b", bias="none", enable_lora=None, fan_in_fan_out=False,
    inference_mode=True, lora_alpha=16, lora_dropout=0.05, merge_weights=False, modules_to_save=None,
    peft_type="LORA", r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
)  # fmt: skip
_WITHOUT_MERGING = {
    key: value for key, value in _FIRST.items() if key not in ("enable_lora", "merge_weights")
}
V03 = _WITHOUT_MERGING | dict(init_lora_weights=True, layers_pattern=None, layers_to_transform=None)
V05 = V03 | dict(auto_mapping=None, revision=None)
V06 = V05 | dict(alpha_pattern={}, rank_pattern={})
V08 = V06 | dict(loftq_config={}, megatron_config=None, megatron_core="megatron.core", use_rslora=False)
V10 = V08 | dict(layer_replication=None, use_dora=False)
V13 = V10 | dict(eva_config=None, exclude_modules=None, lora_bias=False)
V15 = V13 | dict(corda_config=None, trainable_token_indices=None)
V17 = V15 | dict(qalora_group_size=16, target_parameters=None, use_qalora=False)
V18 = V17 | dict(
    alora_invocation_tokens=None, arrow_config=None, ensure_weight_tying=False, peft_version="0.18.0"
)

TAKEN = {
    "PEFT 0.2, as alpaca-lora's adapters": _FIRST
    | dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    "PEFT 0.3": V03,
    "PEFT 0.4, as QLoRA's Guanaco": V03
    | dict(
        r=64, target_modules=["up_proj", "o_proj", "q_proj", "v_proj", "down_proj", "k_proj", "gate_proj"]
    ),
    "PEFT 0.5": V05,
    "PEFT 0.6": V06,
    "PEFT 0.8": V08,
    "PEFT 0.10": V10,
    "PEFT 0.13": V13,
    "PEFT 0.15": V15,
    "PEFT 0.17": V17,
    "PEFT 0.18": V18,
    "Unsloth": V15
    | dict(
        auto_mapping=dict(
            base_model_class="LlamaForCausalLM",
            parent_library="transformers.models.llama.modeling_llama",
            unsloth_fixed=True,
        ),
        base_model_name_or_path="unsloth/llama-3-8b-bnb-4bit",
        lora_dropout=0,
    ),
    "Unsloth, rsLoRA with trained embeddings": V13
    | dict(use_rslora=True, modules_to_save=["lm_head", "embed_tokens"]),
    "axolotl, all linear layers, from a path of another machine": V13
    | dict(base_model_name_or_path="/workspace/models/base", target_modules=["q_proj", "down_proj"]),
    "axolotl, a trained vocabulary": V10 | dict(modules_to_save=["embed_tokens", "lm_head"]),
    "TRL, a pattern": V13 | dict(target_modules=r"model\.layers\.\d+\.self_attn\.(q|v)_proj"),
    "all-linear, not resolved": V10 | dict(target_modules="all-linear"),
    "LLaMA-Factory": V15 | dict(modules_to_save=None, init_lora_weights=True),
    "AutoTrain, alpha a fraction": V10 | dict(lora_alpha=32.0, task_type="CAUSAL_LM"),
    "ranks by layer": V10 | dict(rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 8}),
    "the first 20 layers": V10 | dict(layers_to_transform=list(range(20)), layers_pattern="layers"),
    "DoRA": V10 | dict(use_dora=True),
    "trained tokens": V15 | dict(trainable_token_indices=[32000, 32001]),
    "a configuration of LoftQ left over": V08 | dict(loftq_config=dict(loftq_bits=4, loftq_iter=1)),
    "a starting point that is none of the base": V10 | dict(init_lora_weights="gaussian"),
}

REFUSED = {
    "LoRA of GPT-2's fused layers": (_FIRST | dict(enable_lora=[True, False, True]), "enable_lora = [True"),
    "AdaLoRA": (V10 | dict(peft_type="ADALORA", target_r=8), "peft_type = 'ADALORA' is not supported"),
    "IA3": (dict(peft_type="IA3", target_modules=["k_proj"]), "peft_type = 'IA3' is not supported"),
    "prompt tuning": (dict(peft_type="PROMPT_TUNING", num_virtual_tokens=8), "peft_type = 'PROMPT_TUNING'"),
    "LoHa": (V10 | dict(peft_type="LOHA"), "peft_type = 'LOHA' is not supported"),
    "mlx-lm's own format": (
        dict(fine_tune_type="lora", num_layers=16, lora_parameters=dict(rank=8, scale=20.0)),
        "the key peft_type is missing",
    ),
    "CorDA, unconverted": (
        V15 | dict(init_lora_weights="corda"),
        "init_lora_weights = 'corda' changed the base",
    ),
    "layers repeated": (V10 | dict(layer_replication=[[0, 16], [8, 24]]), "layer_replication = [[0, 16]"),
    "experts' parameters": (V17 | dict(target_parameters=["experts.gate_up_proj"]), "target_parameters = ["),
    "QA-LoRA": (V17 | dict(use_qalora=True), "use_qalora = True is not supported"),
    "activated LoRA": (V18 | dict(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens = [1, 2]"),
    "no targets, the model's defaults": (
        V10 | dict(target_modules=None),
        "the key target_modules is missing",
    ),
    "a rank of none": (V10 | dict(r=0), "r must be a whole number from 1 to 65,536, not 0"),
}


@pytest.mark.parametrize("source", TAKEN)
def test_a_configuration_that_a_program_writes_is_taken_as_it_means(source):
    raw = TAKEN[source]
    config = parse_adapter_config(raw)
    assert (config.r, config.lora_alpha, config.use_rslora) == (
        raw["r"],
        raw["lora_alpha"],
        raw.get("use_rslora", False),
    )
    targets = raw["target_modules"]
    assert config.target_modules == (targets if isinstance(targets, str) else tuple(targets))
    assert config.modules_to_save == tuple(raw["modules_to_save"] or ())


@pytest.mark.parametrize("source", REFUSED)
def test_a_configuration_of_another_kind_is_refused_by_name(source):
    raw, message = REFUSED[source]
    with pytest.raises(UserError) as error:
        parse_adapter_config(raw)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_peft_reads_the_same_configurations():
    peft = pytest.importorskip("peft")
    for source, raw in TAKEN.items():
        known = {key: value for key, value in raw.items() if key not in ("enable_lora", "merge_weights")}
        assert peft.PeftConfig.from_peft_type(**known).r == raw["r"], source
