"""Generation equals transformers, with and without the cache and in batches; sampling keeps its definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import FAMILIES, same_model_here, transformers_model
from support.tiny import ids, small_model, tiny_model

from minilora import LoraConfig, UserError, add_lora, generate, set_adapter
from minilora.backend import choice
from minilora.inference.generation import (
    LEAST_DIVISOR,
    generate_stream,
    keep_top_k,
    keep_top_p,
    pad_left,
    penalize_repetition,
    sample,
)
from minilora.model import KVCache

logits = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12).map(lambda row: torch.tensor([row]))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers_and_do_not_depend_on_the_cache(family):
    theirs = transformers_model(family)
    ours = same_model_here(theirs)
    prompt = ids(2, 10, vocab=97)
    expected = theirs.generate(
        prompt, max_new_tokens=24, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(prompt)
    )
    assert torch.equal(generate(ours, prompt, max_new_tokens=24), expected)
    assert torch.equal(generate(ours, prompt, max_new_tokens=24, use_cache=False), expected)


def test_a_16_bit_model_with_float32_copies_of_all_its_norms_gives_the_same_tokens_with_the_cache():
    model, prompt = tiny_model().bfloat16(), ids(2, 10)
    expected = generate(model, prompt, max_new_tokens=12)
    add_lora(model, LoraConfig(modules_to_save=["norm"]))  # not yet trained
    assert model.model.norm.weight.dtype == torch.float32
    assert torch.equal(generate(model, prompt, max_new_tokens=12), expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_of_different_lengths_get_the_same_tokens_in_one_batch_as_alone(use_cache):
    model = tiny_model(model_type="mistral", sliding_window=6)
    prompts = [ids(1, n)[0].tolist() for n in (3, 11, 7, 1)]
    input_ids, attention_mask = pad_left(prompts, pad_id=0)
    together = generate(model, input_ids, attention_mask, max_new_tokens=12, use_cache=use_cache)
    for prompt, row in zip(prompts, together, strict=True):
        alone = generate(model, torch.tensor([prompt]), max_new_tokens=12)
        assert row[11:].tolist() == alone[0, len(prompt) :].tolist()


def test_a_row_stops_at_eos_and_is_padded_while_others_continue():
    model = tiny_model()
    prompt = ids(3, 5)
    free = generate(model, prompt, max_new_tokens=10)[:, 5:]
    eos = free[0, 3].item()
    rows = generate(model, prompt, max_new_tokens=10, eos_token_ids=(eos,), pad_token_id=60)[:, 5:].tolist()
    for row, expected in zip(rows, free.tolist(), strict=True):
        end = expected.index(eos) + 1 if eos in expected else len(row)
        assert row[:end] == expected[:end][: len(row)] and set(row[end:]) <= {60}


def test_generation_ends_once_every_row_has_ended():
    model = tiny_model()
    prompt = ids(1, 5)
    first = generate(model, prompt, max_new_tokens=1)[0, 5].item()
    assert generate(model, prompt, max_new_tokens=50, eos_token_ids=(first,)).shape == (1, 6)


def test_streamed_tokens_are_the_generated_ones():
    model = tiny_model()
    prompt = ids(2, 5)
    streamed = torch.stack(list(generate_stream(model, prompt, max_new_tokens=8)), dim=1)
    assert torch.equal(streamed, generate(model, prompt, max_new_tokens=8)[:, 5:])


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("adapter", ["default", None])
def test_the_forms_for_one_row_give_the_tokens_of_the_definitions(quantized, adapter, monkeypatch):
    model, prompt = small_model(quantized=quantized).eval(), ids(1, 9, vocab=97)
    set_adapter(model, adapter)
    found = generate(model, prompt, max_new_tokens=30, eos_token_ids=())
    monkeypatch.setenv("MINILORA_BACKEND", "torch")
    monkeypatch.setattr(choice, "_fused", False)
    assert torch.equal(found, generate(model, prompt, max_new_tokens=30, eos_token_ids=()))


def test_on_a_cpu_no_token_is_computed_before_the_last_one_was_taken():
    model, prompt, calls = tiny_model(), ids(2, 5), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    for taken, _ in enumerate(generate_stream(model, prompt, max_new_tokens=8, eos_token_ids=()), 1):
        assert len(calls) == taken


def test_a_stream_that_is_left_leaves_a_cache_that_goes_on():
    model, prompt = tiny_model(), ids(1, 5)
    whole = generate(model, prompt, max_new_tokens=8, eos_token_ids=())
    cache = KVCache(model.config, 1, 13, torch.float32, "cpu")
    settings = dict(cache=cache, eos_token_ids=())
    stream = generate_stream(model, prompt, max_new_tokens=8, **settings)
    first = torch.cat([prompt[0], *(next(stream) for _ in range(3))])
    stream.close()
    assert cache.length == 5 + 2  # the model has not read the third token
    assert torch.equal(generate(model, first[None], max_new_tokens=5, **settings), whole)


def test_repetition_penalty_equals_transformers():
    theirs = transformers_model("llama-gqa")
    ours = same_model_here(theirs)
    prompt = ids(2, 10, vocab=97)
    settings = dict(max_new_tokens=24, repetition_penalty=1.3)
    expected = theirs.generate(
        prompt, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(prompt), **settings
    )
    assert torch.equal(generate(ours, prompt, **settings), expected)


@given(logits, st.floats(0.05, 1.0), st.integers(0, 12))
@settings(max_examples=200, deadline=None)
def test_top_k_and_top_p_keep_what_transformers_keeps(row, p, k):
    process = pytest.importorskip("transformers.generation.logits_process")
    if k:
        assert torch.equal(keep_top_k(row, k), process.TopKLogitsWarper(k)(None, row))
    # transformers sums from the least likely token up, minilora from the most likely down. A sum that equals p
    # up to rounding may fall on either side, and so may ties. So the sets are compared only if no partial sum is
    # that close.
    ordered = row.softmax(-1).sort(descending=True).values
    if ((ordered.cumsum(-1) - p).abs() > 1e-5).all() and len(set(row[0].tolist())) == row.shape[1]:
        assert torch.equal(keep_top_p(row, p), process.TopPLogitsWarper(p)(None, row))


@given(logits, st.floats(0.05, 0.999))
@settings(max_examples=100, deadline=None)
def test_the_nucleus_is_the_smallest_set_that_reaches_p_and_is_never_empty(row, p):
    kept = keep_top_p(row, p).isfinite()
    probability = row.double().softmax(-1)
    inside = probability[kept]
    assert kept[0, row[0].argmax()]
    assert inside.sum() >= p - 1e-5  # the cut is made in float32
    assert inside.sum() - inside.min() < p + 1e-5


def test_padding_does_not_count_as_repetition():
    row, sequence, mask = torch.ones(1, 4), torch.tensor([[3, 0, 1]]), torch.tensor([[0, 1, 1]])
    assert penalize_repetition(row, sequence, 2.0, mask).tolist() == [[0.5, 0.5, 1.0, 1.0]]


def test_sampling_follows_the_distribution_and_temperature_zero_is_greedy():
    row = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    assert sample(row, 0.0, 0, 1.0).item() == 1
    generator = torch.Generator().manual_seed(0)
    draws = sample(row.expand(20000, 4), 0.7, 3, 1.0, generator)
    expected = torch.tensor([1.0, 2.0, 0.0]).div(0.7).softmax(-1)
    seen = torch.bincount(draws, minlength=4)[:4] / 20000
    assert seen[3] == 0
    assert (seen[:3] - expected).abs().max() < 4 * 0.5 / 20000**0.5  # four standard errors of a share


def test_the_same_generator_gives_the_same_text():
    model = tiny_model()
    settings = dict(max_new_tokens=12, temperature=1.0, top_p=0.9)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    runs = [generate(model, ids(2, 4), generator=generator, **settings) for generator in generators]
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    "temperature, penalty", [(LEAST_DIVISOR, LEAST_DIVISOR), (LEAST_DIVISOR, 1 / LEAST_DIVISOR)]
)
def test_at_the_least_divisors_sampling_gives_the_most_likely_token(temperature, penalty):
    model, prompt = tiny_model(), ids(2, 10)
    drawn = generate(model, prompt, max_new_tokens=8, temperature=temperature, repetition_penalty=penalty)
    assert torch.equal(drawn, generate(model, prompt, max_new_tokens=8, repetition_penalty=penalty))


@pytest.mark.parametrize(
    "setting",
    [
        *(dict(temperature=value) for value in (-1, 1e-320, 1e-7)),
        *(dict(repetition_penalty=value) for value in (0, 1e-300, 1e300)),
        dict(top_p=0), dict(top_k=-1), dict(max_new_tokens=0),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        generate(tiny_model(), ids(1, 3), **setting)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 3),
    temperature=st.floats(0.1, 3.0),
    p=st.floats(0.05, 1.0),
)
def test_a_draw_is_that_of_pytorchs_multinomial(seed, rows, temperature, p):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, 50, generator=generator)
    state = generator.get_state()
    found = sample(logits, temperature, 20, p, generator)
    kept = keep_top_p(keep_top_k(logits / temperature, 20), p)
    generator.set_state(state)
    assert torch.equal(found, torch.multinomial(kept.softmax(-1), 1, generator=generator).squeeze(1))
