"""Every kind of LoRA adapter means the same here as in PEFT: read, run, trained, saved, merged."""

import json
import warnings

import pytest
import torch
from safetensors import safe_open
from support.adapter_kinds import KINDS, base_of, peft_again, peft_model
from support.families import config_dict, relative_error, same_model_here
from support.tiny import AFTER_20_STEPS, TOLERANCE, ids

from minilora import (
    CausalLM,
    LoraConfig,
    UserError,
    add_lora,
    load_adapter,
    merge_lora,
    quantize_4bit,
    remove_lora,
    save_adapter,
    set_adapter,
    set_recompute,
    unmerge_lora,
)
from minilora.adapters.merging import Merging
from minilora.adapters.peft_format import LORA_BIAS, STARTS_FROM_W
from minilora.adapters.save_load import adapter_tensors, read_adapter
from minilora.formats.config_json import parse_config
from minilora.linear import Linear4bit
from minilora.lora import trainable_parameters
from minilora.loss import causal_lm_loss
from minilora.wrapping import adapted_layers

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::UserWarning:transformers")


@pytest.fixture(params=KINDS)
def pair(request, tmp_path):
    """A kind, PEFT's model of it, and ours with the adapter that PEFT saved."""
    kind = KINDS[request.param]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft_model(kind, tmp_path / "base")
        theirs.save_pretrained(tmp_path / "theirs", **kind.saving)
    ours = same_model_here(base_of(kind))
    load_adapter(ours, tmp_path / "theirs")
    return kind, theirs, ours, tmp_path


def tokens(kind):
    """Token ids, those of rows that are trained or new among them."""
    found = ids(2, 15, vocab=kind.vocab_size or 97)
    found[0, :8] = torch.tensor([5, 6, 3, 4, 97, 98, 5, 100]).clamp_max((kind.vocab_size or 97) - 1)
    return found


@torch.no_grad()
def test_an_adapter_of_pefts_gives_its_logits(pair):
    kind, theirs, ours, _ = pair
    expected = theirs(input_ids=tokens(kind)).logits
    assert relative_error(ours(tokens(kind)), expected) <= TOLERANCE
    set_adapter(ours, None)
    old = tokens(kind).clamp_max(96)
    base = base_of(kind).eval()(input_ids=old).logits
    assert relative_error(ours(old), base) <= TOLERANCE  # and without it the model is the base


def described(directory):
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        return {k: (file.get_slice(k).get_shape(), file.get_slice(k).get_dtype()) for k in file.keys()}


@torch.no_grad()
def test_saved_again_it_has_pefts_names_and_configuration_and_loads_there(pair):
    kind, theirs, ours, directory = pair
    save_adapter(ours, directory / "ours", base_model_name_or_path=str(directory / "base"))
    names = described(directory / "theirs")
    unchanged = "save_embedding_layers" in kind.saving  # these are the base's own, and not written again
    twice = {k for k in names if ".modules_to_save." in k or ".original_module." in k}
    names = {k: v for k, v in names.items() if k not in twice and not (unchanged and "lora_" not in k)}
    if kind.doubled:  # the two dimensions of the rank, of A and of B
        sizes = {"A": lambda r, n: [2 * r, n], "B": lambda n, r: [n, 2 * r]}
        names = {k: (sizes[k.split("lora_")[1][0]](*shape), dtype) for k, (shape, dtype) in names.items()}
    drawn = {"base_model.vera_A", "base_model.vera_B"} - names.keys()  # we always write them
    written = described(directory / "ours")
    assert {k: v for k, v in written.items() if k not in drawn} == names
    mine, other = (
        json.loads((directory / side / "adapter_config.json").read_text()) for side in ("ours", "theirs")
    )
    assert mine.keys() == other.keys()
    changes_nothing = {"init_lora_weights", "loftq_config"} | ({"save_projection"} if drawn else set())
    if kind.doubled:
        assert mine["init_lora_weights"] is True and mine["r"] == 2 * other["r"]
        assert mine["rank_pattern"] == {name: 2 * r for name, r in other["rank_pattern"].items()}
        factor = 2**0.5 if other["use_rslora"] else 2
        assert mine["lora_alpha"] == factor * other["lora_alpha"]
        changes_nothing |= {"r", "lora_alpha", "rank_pattern"}
    for key in mine.keys() - {"target_modules"} - changes_nothing:
        assert mine[key] == other[key] or not (mine[key] or other[key]), key
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft_again(kind, directory / "ours")
    expected = theirs(input_ids=tokens(kind)).logits
    assert relative_error(again(input_ids=tokens(kind)).logits, expected) <= TOLERANCE


def test_20_adamw_steps_from_it_equal_pefts(pair):
    kind, theirs, ours, _ = pair
    frozen = {p for n, p in theirs.named_parameters() if not p.requires_grad}
    mine, other = trainable_parameters(ours), [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in mine.values()) == sum(p.numel() for p in other)
    assert not frozen & set(other)
    # AdamW's first steps are the signs of gradients. Of the thousands in an embedding some are zero but for
    # rounding, 1e-9 here, and have any sign. An eps far above that makes their steps small instead of full.
    how = dict(lr=1e-3, weight_decay=0.0, eps=1e-5)
    steps = [torch.optim.AdamW(list(ps), **how) for ps in (mine.values(), other)]
    for step in range(20):
        batch = tokens(kind).roll(step)
        causal_lm_loss(ours, batch, batch).div(2 * 14).backward()
        logits = theirs(input_ids=batch).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import get_peft_model_state_dict

        expected = get_peft_model_state_dict(theirs, save_embedding_layers=False)
    for key, tensor in expected.items():
        if ".modules_to_save." not in key and ".original_module." not in key:
            # Behind A and B of a start from W stand those of the first step.
            found = adapter_tensors(ours, "default")[key][tuple(map(slice, tensor.shape))]
            assert relative_error(found, tensor) <= AFTER_20_STEPS, key


@torch.no_grad()
def test_merged_it_gives_the_same_logits_and_unmerged_again(pair):
    kind, theirs, ours, _ = pair
    expected = theirs(input_ids=tokens(kind)).logits
    merge_lora(ours)
    # Merging rounds W + scaling * B A once, to float32.
    assert relative_error(ours(tokens(kind)), expected) <= TOLERANCE
    unmerge_lora(ours)
    assert relative_error(ours(tokens(kind)), expected) <= TOLERANCE
    merge_lora(ours)
    remove_lora(ours)
    assert relative_error(ours(tokens(kind)), expected) <= TOLERANCE
    assert not any("base_layer" in name for name, _ in ours.named_parameters())


@torch.no_grad()
def test_merged_file_by_file_it_is_pefts_merged_model(pair):
    kind, theirs, ours, directory = pair
    base = base_of(kind).state_dict()
    config = parse_config(config_dict(base_of(kind)))
    merging = Merging(read_adapter(directory / "theirs"), config)
    biases = [f"{m}.bias" for m, parts in merging.adapter.modules.items() if LORA_BIAS in parts]
    if any(bias not in base for bias in biases):
        with pytest.raises(UserError, match="lora_bias"):
            merging.check({name: tuple(t.shape) for name, t in base.items()})
        return
    expected = theirs(input_ids=tokens(kind)).logits
    model = CausalLM(merging.config).eval()
    for name, parameter in model.named_parameters():
        source = base[merging.source(name)]
        parameter.copy_(merging.merged(name, source) if merging.changes(name) else source)
    assert relative_error(model(tokens(kind)), expected) <= TOLERANCE


WHOLE_LAYERS = ("modules_to_save, a linear layer", "modules_to_save, a block of layers")  # unquantized alone


def in_4_bits(model):
    """The model with its decoder's linear layers in NF4."""
    for name, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            bias = None if layer.bias is None else layer.bias.data
            model.model.layers.set_submodule(name, Linear4bit(quantize_4bit(layer.weight.data), bias))
    return model


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in WHOLE_LAYERS])
@torch.no_grad()
def test_on_a_base_in_4_bits_it_is_pefts_on_the_dequantized_weights(kind, tmp_path):
    kind, base = KINDS[kind], base_of(KINDS[kind])
    ours = in_4_bits(same_model_here(base))
    for name, layer in ours.named_modules():
        if isinstance(layer, Linear4bit):
            base.get_submodule(name).weight.copy_(layer.weight.dequantize(torch.float32))
    theirs = peft_model(kind, tmp_path / "base", base)
    theirs.save_pretrained(tmp_path / "theirs", **kind.saving)
    if kind.lora.get("init_lora_weights") in STARTS_FROM_W:
        with pytest.raises(UserError, match="took a part out of the unquantized weights"):
            load_adapter(ours, tmp_path / "theirs")
        return
    load_adapter(ours, tmp_path / "theirs")
    expected = theirs(input_ids=tokens(kind)).logits
    assert relative_error(ours(tokens(kind)), expected) <= TOLERANCE


def test_a_layer_in_4_bits_is_not_trained_whole(tmp_path):
    ours = in_4_bits(same_model_here(base_of(KINDS["plain"])))
    with pytest.raises(UserError, match="names model.layers.0.self_attn.k_proj, which is in 4 or 8 bits"):
        add_lora(ours, LoraConfig(target_modules=["q_proj"], modules_to_save=["k_proj"]))
    kind = KINDS["modules_to_save, a linear layer"]
    peft_model(kind, tmp_path / "base").save_pretrained(tmp_path / "theirs")
    ours = in_4_bits(same_model_here(base_of(kind)))
    with pytest.raises(UserError, match="k_proj.weight replaces a weight in 4 or 8 bits; load the model"):
        load_adapter(ours, tmp_path / "theirs")
    assert not adapted_layers(ours)


RECOMPUTED = (
    "modules_to_save, tied",
    "modules_to_save, norms",
    "lora_bias",
    "bias, all",
    "LoRA on embed_tokens",
)


@pytest.mark.parametrize("policy", ["selective", "full"])
@pytest.mark.parametrize("kind", [*RECOMPUTED, "trainable_token_indices, tied", "LoRA on lm_head, tied"])
def test_recompute_changes_no_gradient_of_it(kind, policy, tmp_path):
    kind = KINDS[kind]
    peft_model(kind, tmp_path / "base").save_pretrained(tmp_path / "theirs")
    ours = same_model_here(base_of(kind))
    load_adapter(ours, tmp_path / "theirs")
    gradients = {}
    for name in ("off", policy):
        set_recompute(ours, name)
        ours.zero_grad(set_to_none=True)
        causal_lm_loss(ours, tokens(kind), tokens(kind)).backward()
        gradients[name] = {n: p.grad for n, p in trainable_parameters(ours).items()}
    assert all(torch.equal(g, gradients[policy][n]) for n, g in gradients["off"].items())


@pytest.mark.parametrize(
    "kind", ["modules_to_save, tied", "modules_to_save, norms", "lora_bias", "bias, all"]
)
@torch.no_grad()
def test_what_is_trained_is_float32_beside_a_base_in_bfloat16(kind, tmp_path):
    kind = KINDS[kind]
    peft_model(kind, tmp_path / "base").save_pretrained(tmp_path / "theirs")
    exact = same_model_here(base_of(kind))
    load_adapter(exact, tmp_path / "theirs")
    ours = same_model_here(base_of(kind)).bfloat16()
    load_adapter(ours, tmp_path / "theirs")
    assert {p.dtype for p in trainable_parameters(ours).values()} == {torch.float32}
    logits = ours(tokens(kind))
    assert logits.dtype == torch.bfloat16
    # bfloat16 rounds every activation to 2^-9 of itself; three layers of a few roundings each stay below 2^-4.
    assert relative_error(logits.float(), exact(tokens(kind))) <= 2**-4
    with torch.enable_grad():
        causal_lm_loss(ours, tokens(kind), tokens(kind)).backward()
    assert all(p.grad.dtype == torch.float32 for p in trainable_parameters(ours).values())
