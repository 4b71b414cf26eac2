"""Every kind of adapter as plain LoRA: PEFT's logits stay, all servers load it, or the reason is named."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapter_kinds import KINDS, base_of, peft_again, peft_model
from support.families import config_dict, relative_error
from support.tiny import TOLERANCE, ids

from minilora import LoraConfig, UserError
from minilora.adapters.export import as_plain
from minilora.adapters.file import AdapterFile, write_adapter
from minilora.adapters.lint import lint_adapter
from minilora.adapters.peft_format import PEFT_DEFAULTS, A, B, tensor_key
from minilora.adapters.save_load import read_adapter
from minilora.formats.config_json import parse_config

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::UserWarning:transformers")
NOT_PLAIN = {  # how the kind's name begins -> what stands in the way
    "dora": "is a DoRA adapter",
    "modules_to_save": r"holds \S+(weight|bias),",
    "resized vocabulary": r"holds \S+\.weight,",
    "embeddings saved unchanged": r"holds \S+\.weight,",
    "lora_bias": r"holds \S+\.lora_B\.bias,",
    "bias": r"holds \S+\.bias,",
    "trainable_token_indices": r"holds \S+(lm_head\.weight|\.trainable_tokens_delta),",
    "pissa": r"took a part out of its base model \(init_lora_weights = 'pissa'\)",
    "olora": r"took a part out of its base model \(init_lora_weights = 'olora'\)",
    "vera": r"holds \S+\.vera_lambda_[bd],",
}


def obstacle(name):
    return next((why for word, why in NOT_PLAIN.items() if name.startswith(word)), None)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_any_kind_exported_has_the_same_logits_in_peft_or_is_refused_by_name(name, tmp_path):
    kind = KINDS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft_model(kind, tmp_path / "base")
        theirs.save_pretrained(tmp_path / "adapter", **kind.saving)
        raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        file = read_adapter(tmp_path / "adapter")
        if obstacle(name):
            with pytest.raises(UserError, match=": merge it, with --output") as error:
                as_plain(file, raw)
            assert re.search(obstacle(name), str(error.value)) and "\n" not in str(error.value)
            return
        plain = as_plain(file, raw)
        write_adapter(tmp_path / "plain", plain.config, plain.tensors)
        tokens = ids(2, 15, vocab=97)
        found = peft_again(kind, tmp_path / "plain")(input_ids=tokens).logits
    # Folding an alpha into B rounds each number once more, by 2^-24: far below the tolerance of float32 sums.
    assert relative_error(found, theirs(input_ids=tokens).logits) <= TOLERANCE
    assert plain.config["r"] == 4 * (1 + name.startswith("rank_pattern, full")), "the largest rank"
    config = parse_config(config_dict(base_of(kind)) | {"vocab_size": kind.vocab_size or 97})
    findings = lint_adapter(tmp_path / "plain", config)
    assert not [f for f in findings if f.server != "SGLang"]
    assert not [
        f for f in findings if "is adapted without" not in f.why
    ]  # q_proj alone, which SGLang refuses


@given(r=st.integers(1, 600), alpha=st.floats(0.01, 1000))
@settings(max_examples=50, deadline=None)
def test_an_exported_scaling_is_the_adapters_whatever_rank_and_alpha(r, alpha):
    lora = LoraConfig(r, alpha, use_rslora=True)
    plain = as_plain(adapter(lora, q_proj=r), PEFT_DEFAULTS)
    # Roundings of 2^-53 each: root and quotient on one side, root, product and quotient on the other.
    assert plain.scaling == pytest.approx(lora.scaling, rel=5 * 2**-53)
    assert not plain.config["use_rslora"] and not plain.rounded


def adapter(lora, **ranks):
    """An adapter of random factors for layers of width 5. ranks: of its layers."""
    generator = torch.Generator().manual_seed(0)
    modules = {
        f"model.layers.0.self_attn.{leaf}": {
            A: torch.randn(rank, 5, generator=generator),
            B: torch.randn(5, rank, generator=generator),
        }
        for leaf, rank in ranks.items()
    }
    return AdapterFile(Path("adapter"), lora, modules)


@given(
    ranks=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    alphas=st.tuples(*[st.floats(0.01, 100)] * 3),
    use_rslora=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_each_update_is_the_same_to_one_rounding_and_exact_for_ratios_that_are_powers_of_two(
    ranks, alphas, use_rslora
):
    leaves = ("q_proj", "k_proj", "v_proj")
    patterns = dict(zip(leaves, ranks, strict=True)), dict(zip(leaves, alphas, strict=True))
    lora = LoraConfig(
        target_modules=leaves, rank_pattern=patterns[0], alpha_pattern=patterns[1], use_rslora=use_rslora
    )
    file = adapter(lora, **patterns[0])
    plain = as_plain(file, PEFT_DEFAULTS)
    assert plain.config["r"] == max(ranks) and plain.config["rank_pattern"] == {}
    for module, parts in file.modules.items():
        leaf = module.rpartition(".")[2]
        own = lora.scaling_of(patterns[0][leaf], patterns[1][leaf])
        left, right = (plain.tensors[tensor_key(module, part)].double() for part in (B, A))
        exact = parts[B].double() @ parts[A].double() * own
        # One rounding of B to float32, 2^-24 of each number, and some of the scalings in float64.
        bound = (2**-24 + 8 * 2**-53) * (parts[B].double().abs() @ parts[A].double().abs()) * own
        if module not in plain.rounded:
            bound = 8 * 2**-53 * bound / 2**-24
        assert ((left @ right * plain.scaling - exact).abs() <= bound + 1e-300).all()


def test_a_ratio_beyond_float32_is_refused():
    lora = LoraConfig(alpha_pattern={"q_proj": 1e300, "k_proj": 1e-300, "v_proj": 1e-300})
    with pytest.raises(UserError, match="q_proj overflows float32"):
        as_plain(adapter(lora, q_proj=2, k_proj=2, v_proj=2), PEFT_DEFAULTS)


def test_layers_that_the_configuration_leaves_out_are_refused_for_peft_would_pass_over_them():
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"])
    with pytest.raises(
        UserError, match="v_proj.lora_A.weight is left out by target_modules, exclude_modules"
    ):
        as_plain(adapter(lora, q_proj=2, v_proj=2), PEFT_DEFAULTS)
