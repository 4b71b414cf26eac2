"""Rows of a batch with adapters of their own get the tokens, texts and losses that they get one by one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import ids, tiny_model

from minilora import LoraConfig, UserError, add_lora, generate, load_model, load_tokenizer, set_adapter
from minilora.data.examples import Example
from minilora.data.rows import Row
from minilora.inference.evaluation import answers, evaluate_loss, evaluate_losses
from minilora.inference.generation import generate_text, pad_left
from minilora.wrapping import adapted_layers

NAMES = [None, "plain", "dora", "copies", "rows"]
CONFIGS = {
    "plain": dict(target_modules=["q_proj", "down_proj"]),
    "dora": dict(target_modules=["v_proj"], use_dora=True, lora_dropout=0.5),
    "copies": dict(target_modules=["o_proj"], modules_to_save=["lm_head", "norm"]),
    "rows": dict(target_modules=["up_proj"], trainable_token_indices=(3, 5)),
}


def with_adapters(model):
    """The model with an adapter of each kind, of random values."""
    torch.manual_seed(3)  # of A: with some values, two adapters say the same
    generator = torch.Generator().manual_seed(3)
    for name, config in CONFIGS.items():
        add_lora(model, LoraConfig(r=2, lora_alpha=4, **config), name)
        for layer in adapted_layers(model, name).values():
            for parameter in layer.parts(name).values():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.3 * parameter.abs().mean().clamp_min(0.3) * noise
    set_adapter(model, "plain")
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return with_adapters(tiny_model())


def alone(model, name, function):
    """What a function finds where one adapter is active."""
    set_adapter(model, name)
    found = function(model)
    set_adapter(model, "plain")
    return found


def test_every_row_goes_on_with_the_tokens_of_its_adapter_alone(model):
    prompts = [ids(1, length)[0].tolist() for length in (3, 9, 5, 7, 4, 9)]
    chosen = ["dora", None, "copies", "plain", "rows", "dora"]
    input_ids, mask = pad_left(prompts, pad_id=0)
    how = dict(max_new_tokens=10, eos_token_ids=())
    found = generate(model, input_ids, mask, adapter_ids=chosen, **how)[:, 9:].tolist()
    for prompt, name, new in zip(prompts, chosen, found, strict=True):
        expected = alone(model, name, lambda m, p=prompt: generate(m, torch.tensor([p]), **how))
        assert new == expected[0, len(prompt) :].tolist()
    every = [generate(model, ids(1, 9), adapter_ids=[name], **how).tolist() for name in NAMES]
    assert all(every.count(tokens) == 1 for tokens in every)  # the adapters do something


def test_rows_that_sample_share_one_generator_as_without_adapters(model):
    how = dict(max_new_tokens=8, temperature=1.0, eos_token_ids=())
    drawn = [
        generate(model, ids(3, 4), adapter_ids=chosen, generator=torch.Generator().manual_seed(5), **how)
        for chosen in (["plain"] * 3, None)
    ]
    assert torch.equal(*drawn)


def test_afterwards_the_adapter_that_was_active_is_active_again_also_after_an_error(model):
    before = model(ids(1, 5))
    generate(model, ids(2, 4), adapter_ids=["dora", None], max_new_tokens=2)
    with pytest.raises(UserError, match="no adapter called 'dore'.*'dora'"):
        generate(model, ids(2, 4), adapter_ids=["dora", "dore"], max_new_tokens=2)
    with pytest.raises(UserError, match="adapter_ids names 3 adapters for 2 rows"):
        generate(model, ids(2, 4), adapter_ids=["dora", None, None], max_new_tokens=2)
    assert torch.equal(model(ids(1, 5)), before)


def test_an_adapter_of_fewer_tokens_answers_beside_one_of_more():
    """The logits of a batch have one width: tokens that an adapter has not are impossible for it."""
    model = tiny_model(vocab_size=64)
    for name in ("all", "fewer"):
        add_lora(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), name)
    head = model.lm_head.saved_weight
    head["all"].data[63] = 9 * head["all"].data[:61].mean(0)
    head["fewer"] = torch.nn.Parameter(2 * head["fewer"].data[:61])
    how = dict(max_new_tokens=8, eos_token_ids=(), repetition_penalty=1.3)
    for chosen in (["all", "fewer"], ["fewer", "all"]):
        found = generate(model, ids(2, 5), adapter_ids=chosen, **how)
        for i, name in enumerate(chosen):
            set_adapter(model, name)
            assert torch.equal(found[i], generate(model, ids(2, 5)[i : i + 1], **how)[0])


@pytest.fixture(scope="module")
def speaker(model_dir):
    return with_adapters(load_model(model_dir, dtype=torch.float32)), load_tokenizer(model_dir)


def test_texts_come_in_the_order_of_the_prompts_whatever_the_batches(speaker):
    model, tokenizer = speaker
    prompts = ["the old fox lives by the river", "the", "a young owl", "the old fox", "a", "the old"]
    chosen = ["rows", "copies", None, "dora", "plain", "copies"]
    limits = [5, 9, 3, 6, 7, 4]
    expected = [
        alone(model, name, lambda m, p=prompt, n=n: generate_text(m, tokenizer, [p], max_new_tokens=n))[0]
        for prompt, name, n in zip(prompts, chosen, limits, strict=True)
    ]
    for size in (1, 4, 6):
        texts = generate_text(model, tokenizer, prompts, size, max_new_tokens=limits, adapter_ids=chosen)
        assert texts == expected
    rows = [Row(prompt, "the fox") for prompt in prompts]
    in_order = answers(model, tokenizer, rows, 4, max_new_tokens=3, adapter_ids=chosen, progress="")
    one_by_one = [
        alone(model, name, lambda m, r=row: answers(m, tokenizer, [r], max_new_tokens=3, progress=""))[0]
        for row, name in zip(rows, chosen, strict=True)
    ]
    assert in_order == one_by_one
    with pytest.raises(UserError, match="adapter_ids names 1 adapters for 6 prompts"):
        generate_text(model, tokenizer, prompts, adapter_ids=["plain"])


def example(length: int) -> Example:
    """A row of tokens whose last two thirds are learned."""
    tokens = np.random.default_rng(length).integers(0, 61, length, dtype=np.int32)
    return Example(tokens, np.arange(length) > length // 3, (length,))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=7),
    chosen=st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True),
    batch_size=st.integers(1, 9),
    padding_free=st.booleans(),
)
def test_losses_of_one_pass_are_those_of_one_adapter_after_the_other(
    model, lengths, chosen, batch_size, padding_free
):
    examples = [example(n) for n in lengths]
    found = evaluate_losses(model, examples, chosen, batch_size, padding_free=padding_free)
    assert [*found] == chosen
    for name, loss in found.items():
        expected = alone(model, name, lambda m: evaluate_loss(m, examples, padding_free=padding_free))
        # Sums of some ten float32 losses in another order, each of them off by a few units of 6e-8. Seen: 2e-7.
        assert loss == pytest.approx(expected, rel=1e-6)


def test_no_pass_has_more_rows_than_the_batch_size_says(model):
    examples, rows = [example(6)] * 5, []
    hook = model.model.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    for batch_size in (1, 2, 3, 8, 11):
        rows.clear()
        evaluate_losses(model, examples, NAMES, batch_size, padding_free=False)
        assert max(rows) <= batch_size and sum(rows) == 5 * len(NAMES)
    hook.remove()


def test_a_model_without_adapters_has_the_loss_of_evaluate_loss():
    examples, model = [example(9), example(5)], tiny_model()
    assert evaluate_losses(model, examples, [None]) == {None: evaluate_loss(model, examples)}
    with pytest.raises(UserError, match="no adapter called 'a'"):
        evaluate_losses(model, examples, ["a"])
