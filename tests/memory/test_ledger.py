"""Sizes are exact, moments those of the allocator, peaks those of a process; advice keeps within the memory
there is.
"""

import json
import re
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from functools import partial
from unittest import mock

import memory
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.allocations import Allocations
from support.measured_training import random_model, recompute_policies
from support.project import PROGRAM_ENVIRONMENT, SUPPORT
from support.tiny import state_bytes
from torch.utils._python_dispatch import TorchDispatchMode

from minilora import (
    PRESETS,
    CausalLM,
    LoraConfig,
    ModelConfig,
    QuantConfig,
    UserError,
    add_lora,
    generate,
    load_model,
    save_model,
)
from minilora.backend import choice
from minilora.backend.choice import padded_length
from minilora.formats.config_json import parse_config, to_config_json
from minilora.linear import QuantizedLinear
from minilora.lora import trainable_parameters
from minilora.loss import causal_lm_loss
from minilora.memory.allocator import HEAP_HOLES, compiled_kernel_bytes, padded_lengths
from minilora.memory.ledger import (
    CATEGORIES,
    Answers,
    available_memory,
    memory_ledger,
)
from minilora.optim import make_optimizer
from minilora.recompute import POLICIES, set_recompute
from minilora.system.device import cpu_bfloat16_feature
from minilora.wrapping import ALL_WEIGHTS

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_SEVEN = (*QKVO, "gate_proj", "up_proj", "down_proj")
MISTRAL = memory.SHAPES["mistral-7b"]
QUANTS = {
    "nf4": QuantConfig(),
    "nf4-single": QuantConfig(double_quant=False),
    "int8": QuantConfig(bits=8),
    "none": None,
}


def shape(model_type: str = "llama", **sizes) -> ModelConfig:
    small = dict(
        vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4
    )
    return parse_config(dict(model_type=model_type, num_key_value_heads=2) | small | sizes)


FAMILIES = {
    "llama": shape(),
    "mistral": shape("mistral", sliding_window=7),
    "qwen2-biased-tied": shape("qwen2", tie_word_embeddings=True),
    "qwen3-normed": shape("qwen3", head_dim=20),
    "smollm3-no-rope": shape("smollm3", no_rope_layer_interval=2),
}


# ---- what stays, to the byte ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_scales_and_adapters_are_counted_to_the_byte(family, quant, tmp_path):
    config, dtype = FAMILIES[family], torch.bfloat16
    model = CausalLM(config)
    model.init_weights()
    save_model(model, tmp_path)
    model = load_model(tmp_path, QUANTS[quant], dtype)
    lora = LoraConfig(r=3, target_modules=("q_proj", "down_proj"))
    add_lora(model, lora)
    ledger = memory_ledger(
        config, lora, QUANTS[quant], batch_size=1, length=8, dtype=dtype, recompute="off"
    ).bytes

    weights = [m.weight for m in model.modules() if isinstance(m, QuantizedLinear)]
    trainable = sum(p.nbytes for p in trainable_parameters(model).values())
    others = sum(p.nbytes for p in model.parameters()) - trainable
    assert (
        ledger["linear weights"] + ledger["scales"] + ledger["embeddings, head, norms"]
        == sum(w.nbytes for w in weights) + others
    )
    assert ledger["adapter"] == ledger["gradients"] == trainable
    if weights:
        assert ledger["linear weights"] == sum(
            (w.data if quant == "int8" else w.packed).nbytes for w in weights
        )
        assert ledger["embeddings, head, norms"] == others


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "adamw_bnb_8bit"])
def test_gradients_and_optimizer_states_are_counted_to_the_byte(optim):
    codebooks = 0
    if "bnb" in optim:
        pytest.importorskip("bitsandbytes")
        codebooks = 2 * 4 * 256  # which all its tensors share; ours lie outside the state
    config, lora = (
        shape(hidden_size=528, num_attention_heads=8),
        LoraConfig(r=8, target_modules=("q_proj", "up_proj")),
    )
    model = random_model(
        config, torch.float32
    )  # adapters of 4224 and 640 numbers: of both kinds for the 8-bit optimizers
    add_lora(model, lora)
    trainable = trainable_parameters(model)
    optimizer = make_optimizer(optim, trainable, lr=1e-3, weight_decay=0.0)
    causal_lm_loss(model, torch.arange(16).view(2, 8), torch.arange(16).view(2, 8)).backward()
    optimizer.step()
    kind = dict(batch_size=2, length=8, dtype=torch.float32, recompute="off", device="cpu")
    ledger = memory_ledger(config, lora, QuantConfig(), optim=optim, **kind).bytes
    assert ledger["gradients"] == sum(p.grad.nbytes for p in trainable.values())
    assert ledger["optimizer states"] == state_bytes(optimizer) - codebooks


def test_moments_that_are_paged_are_not_on_the_gpu():
    lora = LoraConfig(r=32, target_modules=("q_proj",))  # tensors of 131,072
    kind = dict(batch_size=1, length=8, dtype=torch.float16, recompute="full")
    paged, kept = (
        memory_ledger(MISTRAL, lora, None, optim=o, **kind).bytes
        for o in ("paged_adamw_8bit", "adamw_bnb_8bit")
    )
    assert kept["optimizer states"] - paged["optimizer states"] == 2 * kept["adapter"] // 4


def test_a_prediction_allocates_nothing_and_draws_no_random_number():
    before = torch.get_rng_state()
    config = replace(MISTRAL, hidden_size=4160, head_dim=130)  # a shape that no test has counted yet
    with Allocations() as allocations:
        memory_ledger(
            config,
            PRESETS["standard_r8_qkvo"],
            QuantConfig(),
            batch_size=4,
            length=1024,
            dtype=torch.float16,
            recompute="off",
        )
    assert allocations.peaks[""] < 1e5 and torch.equal(torch.get_rng_state(), before)


def test_an_adapter_that_the_model_cannot_have_is_refused():
    kind = dict(batch_size=1, length=8, dtype=torch.float32, recompute="off")
    with pytest.raises(UserError, match="'v_porj'"):
        memory_ledger(FAMILIES["llama"], LoraConfig(target_modules=("v_porj",)), None, **kind)


# ---- activations, by what the allocator is asked for -----------------------------------------------------------------------


@st.composite
def training(draw):
    """A model, an adapter, a way to store weights, a shape of batches."""
    H, K = draw(st.sampled_from([4, 8])), 16
    G = draw(st.sampled_from([2, H]))
    model_type = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    window = dict(sliding_window=draw(st.sampled_from([None, 20]))) if model_type == "mistral" else {}
    config = shape(
        model_type,
        vocab_size=draw(st.sampled_from([64, 500, 5000])),
        hidden_size=64 * draw(st.integers(1, 2)),
        intermediate_size=64 * draw(st.integers(3, 5)),
        num_hidden_layers=draw(st.integers(6, 7)),
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=K,
        **window,
    )
    lora = LoraConfig(
        r=draw(st.integers(1, 16)),
        lora_dropout=draw(st.sampled_from([0.0, 0.1])),
        target_modules=draw(st.sampled_from([QKVO, ALL_SEVEN, ("q_proj", "v_proj")])),
        **draw(st.sampled_from([dict(), dict(use_dora=True), dict(lora_fa=True)])),
    )
    return config, lora, dict(batch_size=draw(st.integers(2, 4)), length=draw(st.integers(48, 96)))


@settings(max_examples=10, deadline=None)
@given(
    training(),
    st.lists(st.sampled_from([p for p in POLICIES if p != "offload"]), min_size=7, max_size=7),
    st.booleans(),
    st.sampled_from(["float32", "bfloat16"]),
    st.booleans(),
)
def test_forward_and_backward_allocate_what_the_ledger_says(
    training, policies, same, dtype, multiplies_bfloat16
):
    # 10 %, which is what `fits` leaves room for; seen in 300 such cases: 7 % below to 9 % above. Not counted
    # are tables of RoPE and the like; counted and not there is what the first layer leaves out, as its input
    # needs no gradient: up to half of it.
    (config, lora, sizes), dtype = training, getattr(torch, dtype)
    recompute = policies[0] if same else policies[: config.num_hidden_layers]
    with mock.patch.object(choice, "_cpu_multiplies_bfloat16", lambda: multiplies_bfloat16):
        compare_with_allocations(config, lora, sizes, recompute, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", ["off", "selective", "full"])
def test_training_all_weights_allocates_what_the_ledger_says(recompute, dtype):
    config = shape(
        vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32,
    )  # fmt: skip
    lora = LoraConfig(r=1, lora_alpha=1, modules_to_save=ALL_WEIGHTS)
    model = CausalLM(config).to(getattr(torch, dtype))
    for tokens in (300, 3000):  # of which weights or activations are the larger part
        sizes = dict(batch_size=3, length=tokens // 3)
        predicted, allocated = activation_peaks(
            config, lora, sizes, recompute, getattr(torch, dtype), deepcopy(model), None
        )
        assert max(predicted.values()) == pytest.approx(max(allocated.values()), rel=0.15)


def compare_with_allocations(config, lora, sizes, recompute, dtype):
    predicted, allocated = activation_peaks(config, lora, sizes, recompute, dtype)
    # At rank 1 and a vocabulary of 64 everything is small beside what is not counted: 13 % was seen there.
    assert predicted["backward"] == pytest.approx(allocated["backward"], rel=0.15)
    assert max(predicted.values()) == pytest.approx(max(allocated.values()), rel=0.15)


def activation_peaks(config, lora, sizes, recompute, dtype, model=None, quant=QUANTS["nf4"]):
    """Bytes by moment, as the ledger predicts them; bytes by phase, as PyTorch allocates them."""
    model = random_model(config, dtype) if model is None else model
    add_lora(model, lora)
    set_recompute(model.train(), recompute)
    batch_size, length = sizes["batch_size"], sizes["length"]
    input_ids = torch.randint(0, config.vocab_size, (1, batch_size * length))
    documents = torch.arange(batch_size).repeat_interleave(length).view(1, -1)
    causal_lm_loss(
        model, input_ids, input_ids, documents
    ).backward()  # now there are gradients, as in all micro-batches but the first
    with Allocations() as allocations:
        allocations.phase = "forward"
        loss = causal_lm_loss(model, input_ids, input_ids, documents)
        allocations.phase = "backward"
        loss.backward()
    ledger = memory_ledger(config, lora, quant, dtype=dtype, recompute=recompute, device="cpu", **sizes)
    activations = CATEGORIES[CATEGORIES.index("layer inputs") :]
    predicted = {
        name: sum(moment[category] for category in activations) for name, moment in ledger.moments.items()
    }
    return predicted, allocations.peaks


def test_each_window_that_is_shorter_than_the_examples_has_a_mask_on_a_cpu():
    config = replace(FAMILIES["mistral"], layer_windows=(7, None))
    kind = dict(dtype=torch.float32, recompute="full", device="cpu")

    def masks(moment="backward", **sizes):
        ledger = memory_ledger(config, LoraConfig(), None, **kind | sizes)
        return ledger.moments[moment]["attention masks"]

    assert masks(batch_size=3, length=7) == 0 and masks(batch_size=3, length=8) == 8 * 8 * 4
    assert masks(batch_size=3, length=9) == 9 * 16 * 4  # rows have room for a multiple of 8 numbers
    assert masks(batch_size=3, length=9, device="cuda") == 0  # its kernels know windows
    prompts = dict(batch_size=1, length=9, answers=Answers(3, 50, 1))
    assert masks("answers", **prompts) == 2 * 3 * 50 * 56 * 4  # padded on the left: a mask a row and window


def test_a_batch_of_examples_of_different_lengths_takes_what_its_tokens_take():
    kind = dict(dtype=torch.float16, recompute="off")
    ledger_of = partial(memory_ledger, MISTRAL, LoraConfig(lora_dropout=0.1), QuantConfig(), **kind)
    equal, uneven = ledger_of(batch_size=4, length=512), ledger_of(batch_size=4, length=1024, tokens=2048)
    assert equal.moments == uneven.moments and equal.flop_per_token < uneven.flop_per_token
    assert uneven.peak < ledger_of(batch_size=4, length=1024).peak


def test_dropout_takes_room_for_the_widest_input_of_an_adapter_where_weights_are_dequantized_and_nothing_a_layer():
    kind = dict(batch_size=16, length=2048, dtype=torch.float16, recompute="off")
    for targets, width in ((QKVO, 4096), (ALL_SEVEN, 14336)):
        without, with_dropout = (
            memory_ledger(
                MISTRAL, LoraConfig(target_modules=targets, lora_dropout=p), QuantConfig(), **kind
            ).peak
            for p in (0.0, 0.1)
        )
        assert with_dropout - without == 2 * (16 * 2048 * width - 14336 * 4096)


def test_keys_and_values_are_kept_for_the_heads_that_they_have():
    kind = dict(batch_size=1, length=1024, dtype=torch.float16, recompute="off")
    own, grouped = (
        memory_ledger(
            replace(MISTRAL, num_key_value_heads=G), LoraConfig(target_modules=("o_proj",)), None, **kind
        )
        for G in (32, 8)
    )
    held = [ledger.moments["backward"]["kept activations"] for ledger in (own, grouped)]
    assert (
        held[0] - held[1] == 32 * 2 * (32 - 8) * 128 * 1024 * 2
    )  # layers, k and v, heads, size, tokens, bytes


@settings(max_examples=10, deadline=None)
@given(
    training(),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from([1, 16]),
    st.integers(1, 60),
    st.booleans(),
)
def test_answers_allocate_what_the_ledger_says(training, dtype, shorter, new, multiplies_bfloat16):
    # As above; seen in 300 such cases: 10.2 % below to 0.5 % above. After a short prompt a layer's keys and
    # values and the logits are the peak, in a long one the layer itself.
    (config, lora, sizes), dtype = training, getattr(torch, dtype)
    batch_size, prompt = 2 * sizes["batch_size"], sizes["length"] // shorter
    with mock.patch.object(choice, "_cpu_multiplies_bfloat16", lambda: multiplies_bfloat16):
        model = random_model(config, dtype)
        add_lora(model, lora)
        input_ids = torch.randint(0, config.vocab_size, (batch_size, prompt))
        attention_mask = torch.ones_like(input_ids)
        attention_mask[1, :2] = 0
        answer = partial(generate, model.eval(), input_ids, attention_mask, eos_token_ids=())
        answer(max_new_tokens=1)  # now there is a scratch buffer, as after training
        with Allocations() as allocations:
            answer(max_new_tokens=new)
        kind = dict(batch_size=1, length=8, dtype=dtype, recompute="off", device="cpu")
        answers = Answers(batch_size, prompt, new)
        ledger = memory_ledger(config, lora, QuantConfig(), answers=answers, **kind)
    activations = CATEGORIES[CATEGORIES.index("layer inputs") :]
    predicted = sum(ledger.moments["answers"][category] for category in activations)
    # A prompt of 3 tokens is small beside what is not counted: tables of RoPE, x A^T, the tokens themselves.
    assert predicted == pytest.approx(max(allocations.peaks.values()), rel=0.15)


def test_64_answers_of_mistral_7b_take_more_than_its_training():
    kind = dict(batch_size=4, length=1024, dtype=torch.float16, recompute="full")
    ledger = memory_ledger(MISTRAL, LoraConfig(), QuantConfig(), answers=Answers(64, 1024, 128), **kind)
    keys_and_values = (
        2 * 32 * 64 * (1024 + 128) * 8 * 128 * 2
    )  # layers, rows, tokens, heads, their size, bytes
    assert ledger.bytes["keys and values"] == keys_and_values > 9.6e9
    assert ledger.moment == "answers" and ledger.bytes["gradients"] == 0


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("recompute", ["off", "full"])
def test_doras_outputs_and_the_norms_of_queries_and_keys_share_their_tensors(recompute, dropout):
    sizes = dict(
        vocab_size=64, hidden_size=64, intermediate_size=192, num_hidden_layers=6, num_attention_heads=4
    )
    config = shape("qwen3", **sizes | dict(num_key_value_heads=4, head_dim=16))
    lora = LoraConfig(r=1, lora_dropout=dropout, target_modules=QKVO, use_dora=True)
    compare_with_allocations(config, lora, dict(batch_size=2, length=48), recompute, torch.float32)


BEYOND_LINEAR = {
    "rows": dict(trainable_token_indices=(5, 6)),
    "rows of both": dict(trainable_token_indices={"embed_tokens": [5, 6], "lm_head": [5]}),
    "both whole": dict(modules_to_save=("embed_tokens", "lm_head")),
    "the head whole": dict(modules_to_save=("lm_head",)),
    "a norm whole": dict(modules_to_save=("layers.0.input_layernorm",)),
    "LoRA on the head": dict(target_modules=("q_proj", "lm_head")),
    "LoRA on the embedding": dict(target_modules=("q_proj", "embed_tokens")),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", BEYOND_LINEAR)
def test_all_parts_of_an_adapter_are_counted_to_the_byte(kind, tied):
    config = replace(FAMILIES["llama"], tie_word_embeddings=tied)
    lora = LoraConfig(**dict(r=3, target_modules=("q_proj",)) | BEYOND_LINEAR[kind])
    model = random_model(config, torch.float32)
    model.tie_weights()
    add_lora(model, lora)
    trainable = trainable_parameters(model)
    optimizer = make_optimizer("adamw_torch", trainable, lr=1e-3, weight_decay=0.0)
    causal_lm_loss(model, torch.arange(16).view(2, 8), torch.arange(16).view(2, 8)).backward()
    optimizer.step()
    sizes = dict(batch_size=2, length=8, dtype=torch.float32, recompute="off", device="cpu")
    ledger = memory_ledger(config, lora, QuantConfig(), **sizes).moments["loss"]
    assert ledger["adapter"] == ledger["gradients"] == sum(p.grad.nbytes for p in trainable.values())
    assert ledger["optimizer states"] == state_bytes(optimizer)


@pytest.mark.parametrize("recompute", ["off", "full"])
@pytest.mark.parametrize("kind", BEYOND_LINEAR)
def test_the_peak_with_an_embedding_or_a_head_that_is_trained_is_what_is_allocated(kind, recompute):
    # 10 %, which is what `fits` leaves room for; seen in 200 such cases: 8 % below to 3 % above.
    for dtype, multiplies in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        config = shape(vocab_size=3000, hidden_size=128, intermediate_size=320, num_hidden_layers=6)
        lora = LoraConfig(**dict(r=8, target_modules=QKVO) | BEYOND_LINEAR[kind])
        sizes = dict(batch_size=3, length=64)
        with mock.patch.object(choice, "_cpu_multiplies_bfloat16", lambda to=multiplies: to):
            predicted, allocated = activation_peaks(config, lora, sizes, recompute, getattr(torch, dtype))
        assert max(predicted.values()) == pytest.approx(max(allocated.values()), rel=0.1), dtype


# ---- peaks, by what the system says of a process ---------------------------------------------------------------------------

EIGHT_HEADS = dict(num_attention_heads=8, num_key_value_heads=8)
MEASURED = {  # tensors of a megabyte and more, as in training a real model: below, the heap's holes count
    "llama": (
        shape("llama", vocab_size=8000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, **EIGHT_HEADS),
        dict(lora_dropout=0.05, target_modules=QKVO),
        dict(dtype="float32", batch_size=2, length=512),
    ),
    "mistral, q and v": (
        shape("mistral", vocab_size=8000, hidden_size=768, intermediate_size=2688, num_hidden_layers=3, num_attention_heads=12),
        dict(target_modules=("q_proj", "v_proj")),
        dict(dtype="float32", batch_size=1, length=1024),
    ),
    "qwen3, all seven": (
        shape("qwen3", vocab_size=4000, hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8,
              head_dim=128, tie_word_embeddings=True),
        dict(r=16, target_modules=ALL_SEVEN),
        dict(dtype="float32", batch_size=4, length=256),
    ),
}  # fmt: skip


def measured_ratios(case: str, dtype: str, **environment: str) -> dict[str, float]:
    """Policy -> predicted over measured peak. PyTorch itself, 0.4 GB, is measured and taken off both."""
    config, lora, sizes = MEASURED[case]
    sizes = sizes | dict(dtype=dtype)
    arguments = json.dumps(dict(config=to_config_json(config), lora=lora) | sizes)
    script = [sys.executable, str(SUPPORT / "measured_training.py"), arguments]
    environment = PROGRAM_ENVIRONMENT | {"OMP_NUM_THREADS": "2"} | environment
    done = subprocess.run(script, capture_output=True, text=True, check=True, env=environment)
    peaks = json.loads(done.stdout)
    process = peaks.pop("process")
    kind = sizes | dict(dtype=getattr(torch, dtype), optim="adamw_8bit", device="cpu", process=process)
    predict = partial(memory_ledger, config, LoraConfig(**lora), QuantConfig(), **kind)
    policies = dict.fromkeys(peaks) | recompute_policies(config.num_hidden_layers)
    return {
        name: (predict(recompute=policies[name]).peak - process) / (peak - process)
        for name, peak in peaks.items()
    }


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("case", MEASURED)
def test_the_peak_of_training_is_predicted_within_a_tenth(case):
    # `fits` leaves a tenth free. Seen: 8 % above to 4 % below. Missing are operands that products pack.
    ratios = measured_ratios(case, "float32")
    assert all(0.9 <= ratio <= 1.1 for ratio in ratios.values()), ratios


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc")
@pytest.mark.skipif(cpu_bfloat16_feature() is None, reason="this CPU multiplies bfloat16 in float32")
@pytest.mark.parametrize("case", MEASURED)
def test_the_peak_of_training_in_bfloat16_is_predicted_with_the_compiled_kernels(case):
    # The kernels of one length, 14 to 17 MB, are counted at their most, which long rows need; these are short.
    # That is up to a quarter of the activations of `full` here. Seen: 26 % above to 5 % below.
    ratios = measured_ratios(case, "bfloat16")
    assert all(0.9 <= ratio <= 1.3 for ratio in ratios.values()), ratios


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc")
def test_the_peak_of_training_in_bfloat16_is_predicted_where_products_are_widened(monkeypatch):
    # Seen: 6 % above to 2 % below.
    monkeypatch.setattr(choice, "_cpu_multiplies_bfloat16", lambda: False)
    ratios = measured_ratios("llama", "bfloat16", ONEDNN_MAX_CPU_ISA="AVX2")
    assert all(0.9 <= ratio <= 1.1 for ratio in ratios.values()), ratios


def test_compiled_kernels_are_bounded_however_many_lengths_rows_have():
    lengths = {padded_length(n) for n in range(1, 1025)}
    assert len(lengths) == 32 and all(padded_length(n) >= n for n in range(1, 5000))
    assert max(padded_length(n) / n for n in range(256, 5000)) <= 1 + 1 / 8
    assert compiled_kernel_bytes(len(lengths), len(lengths)) < 0.4e9


@given(st.integers(1, 5000), st.integers(0, 3000))
def test_lengths_are_counted_without_listing_them(shortest, more):
    listed = {padded_length(n) for n in range(shortest, shortest + more + 1)}
    assert padded_lengths(shortest, shortest + more) == len(listed)


def test_the_heaps_holes_are_counted_at_every_moment_with_activations():
    kind = dict(batch_size=2, length=64, dtype=torch.float32, recompute="off", device="cpu")
    without = memory_ledger(FAMILIES["llama"], LoraConfig(), None, **kind)
    with_holes = memory_ledger(FAMILIES["llama"], LoraConfig(), None, heap_holes=True, **kind)
    activations = ("layer inputs", "kept activations", "live layer", "hidden and logits")
    for moment, held in with_holes.moments.items():
        assert without.moments[moment]["heap holes"] == 0
        assert held["heap holes"] == int(HEAP_HOLES * sum(held[name] for name in activations))
    assert with_holes.peak > without.peak


def test_mistral_7b_at_4_x_1024_with_full_recompute_takes_less_than_6_and_a_half_gigabytes():
    kind = dict(batch_size=4, length=1024, dtype=torch.float16, recompute="full", optim="adamw_8bit")
    ledger = memory_ledger(MISTRAL, PRESETS["standard_r8_qkvo"], QuantConfig(), **kind)
    assert ledger.peak <= 6.5e9
    tokens, D, F = 4 * 1024, 4096, 14336
    assert ledger.bytes["linear weights"] == 6_979_321_856 // 2
    assert ledger.bytes["embeddings, head, norms"] == 2 * 262_410_240
    assert ledger.bytes["adapter"] == 4 * 6_815_744
    assert ledger.bytes["layer inputs"] == 32 * tokens * D * 2
    assert ledger.bytes["scratch"] == F * D * 2


# ---- what must hold for all --------------------------------------------------------------------------------------------------


@st.composite
def settings_of_any_run(draw):
    """(model, adapter), and the keyword arguments of `memory_ledger`. Of two layers or more: in one there is
    nothing to save.
    """
    H = draw(st.sampled_from([1, 2, 8]))
    model_type = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    config = shape(
        model_type,
        vocab_size=draw(st.integers(2, 5000)),
        hidden_size=64 * draw(st.integers(1, 4)),
        intermediate_size=64 * draw(st.integers(1, 8)),
        num_hidden_layers=draw(st.integers(2, 5)),
        num_attention_heads=H,
        num_key_value_heads=draw(st.sampled_from([1, H])),
        head_dim=draw(st.sampled_from([32, 64])),
        tie_word_embeddings=draw(st.booleans()),
        **dict(sliding_window=100) if model_type == "mistral" else {},
    )
    lora = LoraConfig(
        r=draw(st.integers(1, 64)),
        lora_dropout=draw(st.sampled_from([0.0, 0.1])),
        target_modules=draw(st.lists(st.sampled_from(ALL_SEVEN), min_size=1, unique=True)),
        use_dora=draw(st.booleans()),
    )
    return (config, lora), dict(
        batch_size=draw(st.integers(1, 64)),
        length=draw(st.integers(2, 4096)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        recompute=draw(st.sampled_from(POLICIES)),
        device=draw(st.sampled_from(["cuda", "cpu"])),
        eval_batch_size=draw(st.integers(0, 64)),
        process=draw(st.integers(0, 10**9)),
    )


quants = st.sampled_from(list(QUANTS.values()))
optims = st.sampled_from(["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])


@settings(max_examples=50, deadline=None)
@given(settings_of_any_run(), quants, optims)
def test_all_moments_name_all_categories_and_the_peak_is_the_sum_of_the_largest(run, quant, optim):
    (config, lora), kind = run
    ledger = memory_ledger(config, lora, quant, optim=optim, **kind)
    assert all(
        tuple(moment) == CATEGORIES and min(moment.values()) >= 0 for moment in ledger.moments.values()
    )
    assert (
        ledger.peak
        == sum(ledger.bytes.values())
        == max(sum(moment.values()) for moment in ledger.moments.values())
    )
    assert ("evaluation" in ledger.moments) == (kind["eval_batch_size"] > 0)
    of_weights = CATEGORIES[: CATEGORIES.index("gradients")]
    assert len({tuple(moment[name] for name in of_weights) for moment in ledger.moments.values()}) == 1


@settings(max_examples=50, deadline=None)
@given(settings_of_any_run(), quants, optims, st.data())
def test_more_examples_and_longer_ones_and_higher_ranks_never_take_less(run, quant, optim, data):
    (config, lora), kind = run
    peak = memory_ledger(config, lora, quant, optim=optim, **kind).peak
    for name in ("batch_size", "length", "eval_batch_size", "process"):
        more = kind[name] + data.draw(st.integers(0, 64), label=name)
        assert memory_ledger(config, lora, quant, optim=optim, **kind | {name: more}).peak >= peak, name
    # Of 32-bit states only: a tensor that grows to 4096 numbers has its states in 8 bits and takes a quarter
    # at once.
    ranks = lora.r, lora.r + data.draw(st.integers(0, 64), label="rank")
    low, high = (memory_ledger(config, replace(lora, r=r), quant, **kind).peak for r in ranks)
    assert low <= high


@settings(max_examples=50, deadline=None)
@given(settings_of_any_run(), quants, optims)
def test_a_slower_policy_never_takes_more(run, quant, optim):
    (config, lora), kind = run
    ledgers = [
        memory_ledger(config, lora, quant, optim=optim, **kind | dict(recompute=policy))
        for policy in POLICIES
    ]
    assert [ledger.peak for ledger in ledgers] == sorted((ledger.peak for ledger in ledgers), reverse=True)
    assert [ledger.flop_per_token for ledger in ledgers] == sorted(
        ledger.flop_per_token for ledger in ledgers
    )
    assert [ledger.recompute for ledger in ledgers] == [
        *POLICIES[:3],
        "offload" if kind["device"] == "cuda" else "full",
    ]


@settings(max_examples=50, deadline=None)
@given(settings_of_any_run(), optims)
def test_fewer_bits_never_take_more(run, optim):
    (config, lora), kind = (
        run  # of four layers or more: int8 has a layer in float32 beside its scratch, a toy's whole gain
    )
    config = replace(
        config, num_hidden_layers=2 * config.num_hidden_layers, layer_windows=2 * config.layer_windows
    )
    order = QuantConfig(), QuantConfig(double_quant=False), QuantConfig(bits=8), None
    peaks = [memory_ledger(config, lora, quant, optim=optim, **kind).peak for quant in order]
    assert peaks == sorted(peaks)


class Products(TorchDispatchMode):
    """Floating-point operations of matrix products; those of fused attention are not among them."""

    def __init__(self):
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            (rows, inner), (_, columns) = (t.shape for t in arguments[-2:])
            self.flop += 2 * rows * inner * columns
        assert operation.overloadpacket not in (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
        return operation(*arguments, **options or {})


@pytest.mark.parametrize("policy, attentions", [("off", 3.5), ("selective", 3.5), ("full", 4.5)])
def test_arithmetic_is_that_of_the_products_that_are_taken(policy, attentions):
    config, lora = (
        shape(hidden_size=256, intermediate_size=512, num_hidden_layers=4),
        LoraConfig(r=4, target_modules=ALL_SEVEN),
    )
    model = random_model(config, torch.float32)
    add_lora(model, lora)
    set_recompute(model, policy)
    input_ids = torch.arange(64).view(4, 16)
    with Products() as products:
        causal_lm_loss(model, input_ids, input_ids).backward()
    kind = dict(batch_size=4, length=16, dtype=torch.float32, recompute=policy, device="cpu")
    predicted = 64 * memory_ledger(config, lora, QuantConfig(), **kind).flop_per_token
    # Attention, apart: 2 products of 256 numbers with on average 8 keys, in 4 layers. What the ledger does
    # not know: the first layer's q, k and v need no dx. What remains: the last place has no logits, 1/16 of
    # 0.5 %.
    attention, first = 64 * attentions * 4 * 2 * (2 * 256 * 8), 64 * 2 * 256 * (256 + 128 + 128)
    assert products.flop == pytest.approx(predicted - attention - first, rel=2e-3)


def test_a_training_step_of_mistral_7b_takes_30_gflop_a_token_and_40_with_recompute():
    kind = dict(batch_size=4, length=1024, dtype=torch.float16)
    counts = [
        memory_ledger(MISTRAL, LoraConfig(), None, recompute=policy, **kind).flop_per_token / 1e9
        for policy in POLICIES
    ]
    # By hand, in GFLOP: linear layers 13.96, of them down_proj 3.76; attention 0.27; head 0.26; adapters
    # 0.01.
    off = 2 * 13.96 + 3.5 * 0.27 + 2 * 0.26 + 3 * 0.014
    again = 13.96 - 3.76 + 0.014
    assert counts == pytest.approx([off, off + again, off + again + 0.27, off + again + 0.27], rel=1e-3)


# ---- the memory of this machine ----------------------------------------------------------------------------------------------


def test_the_memory_that_is_free_is_told():
    free = available_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


# ---- the script ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(call, tmp_path, monkeypatch):
    """Run `memory.py ARGUMENTS` in tmp_path: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return partial(call, "memory")


def test_the_script_says_what_fits_a_t4_without_any_file(ask, tmp_path):
    code, out, _ = ask(
        "--model", "mistral-7b", "--gpu", "16", "--per_device_train_batch_size", "4", "--lora_dropout", "0"
    )
    rows = {line[:28].strip(): line[28:].split() for line in out.splitlines()}
    assert code == 0 and rows["GB"] == [*POLICIES, "auto"]
    categories = [rows[name] for name in CATEGORIES if name in rows]
    sums = [sum(map(float, column)) for column in zip(*categories, strict=True)]
    assert [float(peak) for peak in rows["peak"]] == pytest.approx(
        sums, abs=0.006
    )  # twelve numbers, each rounded to 0.001
    assert rows["fits, with a tenth to spare"] == ["no", "yes", "yes", "yes", "yes"]
    off, selective, *_, auto = map(float, rows["peak"])
    assert selective < auto < off and auto <= (16 - 0.5) / 1.1 + 0.001
    speed = [float(number) for number in rows["relative speed, by FLOPs"]]
    assert speed[1] < speed[-1] < 1
    plan = re.search(r"^auto: (off in \d+ layers, .*)$", out, re.MULTILINE).group(1)
    assert f"advice: --gradient_checkpointing auto   ({plan}; " in out
    assert (
        "--gradient_checkpointing off --per_device_train_batch_size 2 --gradient_accumulation_steps 8 " in out
    )
    assert (tmp_path / "memory.png").read_bytes()[:4] == b"\x89PNG"


def test_the_script_reads_a_run_of_the_trainer_and_of_a_model_nothing_but_its_config(ask, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_config_json(FAMILIES["llama"])))
    (tmp_path / "run.yaml").write_text(
        f"model: {tmp_path}\nlora_r: 4\ncutoff_len: 32\neval_dataset: not-read.jsonl\n"
    )
    code, out, _ = ask("--config", "run.yaml", "--batch-size", "2", "--picture", "bars.png")
    assert code == 0 and "2 x 32 tokens, r 4 on" in out and "offload" not in out
    assert (tmp_path / "bars.png").exists() and not (tmp_path / "memory.png").exists()


def test_what_does_not_fit_is_cut_or_said(ask):
    assert "--cutoff_len " in ask("--model", "llama-3-8b", "--gpu", "8", "--cutoff_len", "8192")[1]
    assert "advice: nothing fits" in ask("--model", "llama-3-8b", "--gpu", "4")[1]


def test_mistakes_are_told_in_a_line(ask, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    mistakes = {
        "mistral-8b": ("--model", "mistral-8b", "--gpu", "16"),
        "learning_rat": ("--learning_rat", "1"),
        "--gpu": ("--gpu", "-3"),
        "v_porj": ("--model", "mistral-7b", "--lora_target", "v_porj", "--gpu", "16"),
    }
    for named, arguments in mistakes.items():
        code, _, err = ask(*arguments)
        assert code == 2 and err.count("\n") == 1 and named in err
