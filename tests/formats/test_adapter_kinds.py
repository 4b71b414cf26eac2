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
    UserError,
    load_adapter,
    merge_lora,
    remove_lora,
    save_adapter,
    set_adapter,
    unmerge_lora,
)
from minilora.formats.adapter import adapter_tensors, read_adapter
from minilora.formats.config_json import parse_config
from minilora.formats.merging import Merging
from minilora.formats.peft_format import LORA_BIAS
from minilora.lora import trainable_parameters
from minilora.loss import causal_lm_loss

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
    steps = [torch.optim.AdamW(list(ps), lr=1e-3, weight_decay=0.0) for ps in (mine.values(), other)]
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
