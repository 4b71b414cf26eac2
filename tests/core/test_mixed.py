"""A batch in which each row has its own adapter: every row gets the numbers that it gets alone."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import FAMILIES, relative_error, same_model_here, transformers_model
from support.tiny import TOLERANCE, ids, tiny_model
from torch import nn

from minilora import (
    KVCache,
    LoraConfig,
    UserError,
    add_lora,
    generate,
    merge_lora,
    remove_lora,
    set_adapter,
    set_recompute,
)
from minilora.linear import Linear4bit
from minilora.lora import lora_layers, trainable_parameters
from minilora.loss import causal_lm_loss
from minilora.mixed import Mixture, adapters, causal_lm_losses
from minilora.mixed_layer import Mixed
from minilora.quantization import quantize_4bit
from minilora.wrapping import adapted_layers, adapter_names, train_adapters

ALONE = 1e-6  # of the largest logit: float32 sums of fewer rows at a time may run in another order
KINDS = {
    "lora": dict(target_modules="all-linear"),
    "some layers": dict(target_modules=("q_proj", "down_proj"), layers_to_transform=[1]),
    "rslora": dict(target_modules="all-linear", use_rslora=True),
    "dora": dict(target_modules="all-linear", use_dora=True),
    "vera": dict(target_modules=("q_proj", "k_proj", "up_proj"), use_vera=True),
    "pissa": dict(target_modules=("q_proj", "v_proj"), init_lora_weights="pissa"),
    "lora_bias": dict(target_modules=("q_proj",), lora_bias=True),
    "embedding": dict(target_modules=("embed_tokens", "q_proj")),
    "head": dict(target_modules=("q_proj", "lm_head")),
    "norms": dict(target_modules=("q_proj",), modules_to_save=("norm", "input_layernorm")),
    "whole head": dict(target_modules=("q_proj",), modules_to_save=("embed_tokens", "lm_head")),
    "rows": dict(target_modules=("q_proj",), trainable_token_indices=[3, 5, 7]),
}


@torch.no_grad()
def spread(model: nn.Module, seed: int = 0) -> None:
    """Move every part of every adapter away from where it starts, so that nothing is hidden by B = 0."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        for name in layer.configs:
            for parameter in layer.parts(name).values():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.05


def model_with(kinds, seed: int = 0, ranks=None, quantized: bool = False, dropout: float = 0.0, **changes):
    model = tiny_model(seed, **changes)
    if quantized:
        for name, layer in list(model.model.layers.named_modules()):
            if isinstance(layer, nn.Linear):
                model.model.layers.set_submodule(name, Linear4bit(quantize_4bit(layer.weight.data)))
    for i, kind in enumerate(kinds):
        config = dict(r=ranks[i] if ranks else 2 + i, lora_alpha=3 + i, lora_dropout=dropout) | KINDS[kind]
        torch.manual_seed(i)
        add_lora(model, LoraConfig(**config), name=f"{kind.replace(' ', '_')}{i}")
    spread(model)
    return model.eval()


def rows_of_each(who):
    return {name: [i for i, other in enumerate(who) if other == name] for name in dict.fromkeys(who)}


@torch.no_grad()
def assert_rows_are_as_alone(model, who, batch, **how):
    with adapters(model, who):
        mixed = model(batch, **how)
    for name, rows in rows_of_each(who).items():
        set_adapter(model, name)
        documents = {key: value[rows] for key, value in how.items()}
        assert relative_error(mixed[rows], model(batch[rows], **documents)) <= ALONE, name


@pytest.mark.parametrize("count", [1, 3, 16])
def test_rows_of_adapters_of_any_rank_get_the_logits_that_they_get_alone(count):
    ranks = [1, 64, 7, *range(2, 65, 5)][:count]
    model = model_with(["lora"] * count, ranks=ranks)
    who = [*adapter_names(model), None, *adapter_names(model)[::-1]]
    random.Random(count).shuffle(who)
    assert_rows_are_as_alone(model, who, ids(len(who), 9))


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_any_kind_is_as_alone_in_mixed_company(kind, quantized):
    model = model_with([kind, "lora", kind], quantized=quantized)
    names = adapter_names(model)
    assert_rows_are_as_alone(model, [names[2], None, names[0], names[1], names[2]], ids(5, 9))


@settings(max_examples=25, deadline=None)
@given(who=st.lists(st.integers(-1, 3), min_size=1, max_size=7), length=st.integers(1, 6))
def test_any_choice_of_adapters_in_any_order_is_as_alone(who, length):
    model = model_with(["lora", "dora", "norms", "some layers"])
    names = adapter_names(model)
    assert_rows_are_as_alone(model, [None if i < 0 else names[i] for i in who], ids(len(who), length))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_a_mixed_batch(family):
    model = same_model_here(transformers_model(family)).eval()
    for i, kind in enumerate(["lora", "norms"]):
        add_lora(model, LoraConfig(r=2 + i, **KINDS[kind]), name=f"a{i}")
    spread(model)
    assert_rows_are_as_alone(model, ["a1", "a0", None, "a1"], ids(4, 9))


def test_packed_rows_take_one_adapter_each():
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 9, [0] * 2 + [1] * 7])
    model = model_with(["lora", "dora"])
    assert_rows_are_as_alone(model, [*adapter_names(model), None], ids(3, 9), document_ids=documents)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@torch.no_grad()
def test_logits_of_a_mixed_batch_equal_pefts():
    """PEFT's own mixed batches, `adapter_names=` in forward, as an oracle that shares no code."""
    peft = pytest.importorskip("peft")
    theirs = transformers_model("llama-gqa")
    ours = same_model_here(theirs)
    wrapped = None
    for name, r in (("a", 1), ("b", 4), ("c", 16)):
        how = dict(r=r, lora_alpha=2 * r, target_modules=["q_proj", "v_proj", "down_proj"])
        add_lora(ours, LoraConfig(**how), name=name)
        config = peft.LoraConfig(task_type="CAUSAL_LM", **how)
        if wrapped is None:
            wrapped = peft.get_peft_model(theirs, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    spread(ours)
    for path, layer in lora_layers(ours).items():
        twin = wrapped.base_model.model.get_submodule(path)
        for name in "abc":
            twin.lora_A[name].weight.copy_(layer.lora_A[name])
            twin.lora_B[name].weight.copy_(layer.lora_B[name])
    batch, who = ids(6, 12, vocab=97), ["b", None, "c", "a", "b", "c"]
    expected = wrapped.eval()(input_ids=batch, adapter_names=[name or "__base__" for name in who]).logits
    with adapters(ours, who):
        assert relative_error(ours(batch), expected) <= TOLERANCE


# ---- with the cache ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3, 16])
def test_with_the_cache_rows_are_as_alone_token_by_token(count):
    model = model_with(["lora", "dora", "head", "norms"] * 4, ranks=[1, 64, 3, 8] * 4)
    who = [*adapter_names(model)[:count], None]
    batch = ids(len(who), 8)

    def by_token(batch):
        cache = KVCache(model.config, len(batch), 8, torch.float32, "cpu")
        pieces = [
            model(batch[:, :5], cache=cache),
            *(model(batch[:, i : i + 1], cache=cache) for i in range(5, 8)),
        ]
        return torch.cat(pieces, dim=1)

    with adapters(model, who):
        mixed = by_token(batch)
    for i, name in enumerate(who):
        set_adapter(model, name)
        assert relative_error(mixed[i : i + 1], by_token(batch[i : i + 1])) <= ALONE


def test_answers_of_a_mixed_batch_are_those_of_each_adapter_alone():
    model = model_with(["lora", "head", "whole head"], tie_word_embeddings=False)
    who, batch = [None, *adapter_names(model), None], ids(5, 6)
    how = dict(max_new_tokens=12, eos_token_ids=())
    with adapters(model, who):
        mixed = generate(model, batch, **how)
    for i, name in enumerate(who):
        set_adapter(model, name)
        assert torch.equal(mixed[i : i + 1], generate(model, batch[i : i + 1], **how)), name


# ---- backward ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["off", "selective", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_each_adapter_alone(kind, policy):
    model = model_with(["lora", kind, kind], ranks=[64, 3, 1], dropout=0.25).train()
    set_recompute(model, policy)
    names, batch = adapter_names(model), ids(5, 9)
    who = [names[1], names[0], names[2], names[1], names[0]]
    train_adapters(model, names)
    torch.manual_seed(5)
    with adapters(model, who):
        losses = causal_lm_losses(model, batch, batch)
        sum(losses.values()).backward()
    mixed = {name: p.grad for name, p in trainable_parameters(model).items()}
    assert all(gradient is not None for gradient in mixed.values())
    seen = set()
    for name, rows in rows_of_each(who).items():
        model.zero_grad(set_to_none=True)
        set_adapter(model, name)
        torch.manual_seed(5)  # the same elements are dropped, whoever else is there
        loss = causal_lm_loss(model, batch[rows], batch[rows])
        loss.backward()
        assert losses[name].item() == pytest.approx(loss.item(), rel=ALONE)
        for path, parameter in trainable_parameters(model).items():
            assert relative_error(mixed[path], parameter.grad) <= TOLERANCE, path
            seen.add(path)
    assert seen == set(mixed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_a_mixed_batch_is_as_near_to_float32_as_each_adapter_alone(dtype):
    model = model_with(["lora", "dora", "lora"]).train()
    names, batch = adapter_names(model), ids(3, 9)

    def gradients(one_by_one: bool) -> dict:
        model.zero_grad(set_to_none=True)
        for rows, name in (
            [([i], name) for i, name in enumerate(names)] if one_by_one else [([0, 1, 2], None)]
        ):
            if one_by_one:
                set_adapter(model, name)
                causal_lm_loss(model, batch[rows], batch[rows]).backward()
            else:
                train_adapters(model, names)
                with adapters(model, names):
                    sum(causal_lm_losses(model, batch, batch).values()).backward()
        train_adapters(model, names)
        return {path: p.grad.clone() for path, p in trainable_parameters(model).items()}

    exact = gradients(one_by_one=True)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    alone, mixed = gradients(one_by_one=True), gradients(one_by_one=False)
    mean = [
        sum(relative_error(found[path], exact[path]) for path in exact) / len(exact)
        for found in (alone, mixed)
    ]
    # Alone, layers that share an input run fused, and their updates are rounded once less: seen up to 1.1.
    assert mean[1] <= 1.25 * mean[0]


# ---- the doors ---------------------------------------------------------------------------------------------


def test_after_a_mixed_batch_the_model_is_what_it_was():
    model = model_with(["lora", "norms"])
    set_adapter(model, "lora0")
    before, names, logits = (
        dict(model.named_modules()),
        [n for n, _ in model.named_parameters()],
        model(ids(1, 5)),
    )
    attributes = {module: set(vars(module)) for module in model.modules()}
    with pytest.raises(ZeroDivisionError), adapters(model, ["norms1", "lora0"]):
        model(ids(2, 5))
        raise ZeroDivisionError
    assert all(vars(module).keys() == kept for module, kept in attributes.items())
    assert dict(model.named_modules()) == before and [n for n, _ in model.named_parameters()] == names
    assert torch.equal(model(ids(1, 5)), logits)


def test_a_name_that_no_adapter_has_is_refused_with_the_nearest():
    with (
        pytest.raises(UserError, match="no adapter called 'lora_0'.*lora0"),
        adapters(model_with(["lora"]), ["lora_0"]),
    ):
        pass


def test_a_merged_adapter_is_refused():
    model = model_with(["lora"])
    merge_lora(model)
    with pytest.raises(UserError, match="'lora0' is merged"):
        Mixture(model)


def test_one_mixture_at_a_time():
    model = model_with(["lora"])
    with adapters(model, ["lora0"]), pytest.raises(UserError, match="leave the first"):
        Mixture(model)
    assert not any(isinstance(module, Mixed) for module in model.modules())


def test_an_adapter_is_neither_added_nor_removed_inside():
    model = model_with(["lora"])
    with adapters(model, ["lora0"]):
        for change in (lambda: add_lora(model, LoraConfig(), name="b"), lambda: remove_lora(model, "lora0")):
            with pytest.raises(UserError, match="leave `with adapters`"):
                change()
    remove_lora(model)


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_a_second_run_outside_is_refused_and_not_wrong(policy):
    model = model_with(["lora", "dora"]).train()
    set_recompute(model, policy)
    train_adapters(model, adapter_names(model))
    with adapters(model, adapter_names(model)) as mixture:
        loss = sum(causal_lm_losses(model, ids(2, 9), ids(2, 9)).values())
        mixture.choose([None, None])
        with pytest.raises(RuntimeError, match="inside its"):
            loss.backward()
        mixture.choose(adapter_names(model))
        loss = sum(causal_lm_losses(model, ids(2, 9), ids(2, 9)).values())
    with pytest.raises(RuntimeError, match="inside its"):
        loss.backward()


@pytest.mark.parametrize("rows", [1, 3, 4])  # 4 rows could be two for each name
def test_a_batch_of_another_number_of_rows_is_refused(rows):
    model = model_with(["lora"])
    mended = f"chosen for 2 rows, and the batch has {rows}; give each row its adapter, or None"
    with adapters(model, ["lora0", None]):
        with pytest.raises(UserError, match=mended):
            model(ids(rows, 5))
        with pytest.raises(UserError, match=mended):
            causal_lm_losses(model, ids(rows, 5), ids(rows, 5))
    assert model(ids(rows, 5)).shape[0] == rows


@pytest.mark.parametrize("who, said", [([], "chosen for 0 rows"), ([3], "no adapter called 3")])
def test_a_list_that_names_no_adapter_is_refused_in_a_line(who, said):
    model = model_with(["lora"])
    with pytest.raises(UserError, match=said), adapters(model, who):
        model(ids(1, 5))


def test_the_plain_loss_of_a_mixed_head_is_refused_and_not_wrong():
    model = model_with(["head"])
    with adapters(model, ["head0", None]), pytest.raises(ValueError, match="causal_lm_losses"):
        causal_lm_loss(model, ids(2, 5), ids(2, 5))
    with pytest.raises(UserError, match="choose them by"):
        causal_lm_losses(model, ids(2, 5), ids(2, 5))


def test_a_mixture_is_chosen_again_for_every_step():
    model = model_with(["lora", "dora"])
    mixture = Mixture(model)
    try:
        for who in (["lora0"], ["dora1", None, "lora0"], [None, None]):
            mixture.choose(who)
            logits = model(ids(len(who), 5))
            assert logits.shape[0] == len(who)
            last = logits
    finally:
        mixture.remove()
    set_adapter(model, None)
    assert relative_error(last, model(ids(2, 5))) <= ALONE


def test_train_adapters_makes_trainable_what_set_adapter_would():
    model = model_with(["lora", "norms", "whole head"])
    add_lora(model, LoraConfig(r=2, lora_fa=True), name="fa")
    expected = set()
    for name in ("norms1", "fa"):
        set_adapter(model, name)
        expected |= set(trainable_parameters(model))
    train_adapters(model, ["fa", "norms1"])
    assert set(trainable_parameters(model)) == expected
