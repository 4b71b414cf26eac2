"""A run that ends in inf or nan names the layer where they begin, and tells float16's range from a learning rate."""

import math

import pytest
import torch
from support.project import adapter, metrics
from support.tiny import small_model

from minilora import load_model, save_model
from minilora.run.divergence import first_not_finite

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def overflowing(model_dir, tmp_path):
    """The tiny model with a feed-forward whose weights are finite, and the output of whose last layer is not:
    its directory.
    """

    def scale(up: float, down: float):
        model = load_model(model_dir)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(up)
            model.model.layers[1].mlp.down_proj.weight.mul_(down)
        save_model(model, tmp_path / "base")
        for file in model_dir.glob("tokenizer*"):
            (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
        return tmp_path / "base"

    return scale


@pytest.fixture
def lose(trainer, monkeypatch):
    """Make the loss of these steps (from 1) nan, one micro-batch a step. The model itself is sound."""

    def steps(*lost: int):
        original, calls = trainer.causal_lm_loss, iter(range(1, 10_000))
        change = lambda *a: original(*a) * (math.nan if next(calls) in lost else 1)  # noqa: E731
        monkeypatch.setattr(trainer, "causal_lm_loss", change)

    return steps


ONE_BATCH = dict(per_device_train_batch_size=8, gradient_accumulation_steps=1, logging_steps=1)

# ---- which layer it was --------------------------------------------------------------------------------------


def batch(tokens: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(2 * tokens).view(2, tokens)
    return ids, ids


@pytest.mark.parametrize(
    "name, place",
    [
        ("model.layers.1.mlp.down_proj", "the output of model.layers.1.mlp.down_proj"),
        ("model.layers.2.self_attn.q_proj", "the output of model.layers.2.self_attn.q_proj"),
        ("model.norm", "the output of model.norm"),
        ("lm_head", "the output of lm_head"),
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_the_first_layer_whose_output_is_not_finite_is_named(name, place, quantized):
    model = small_model(quantized=quantized).float()
    layer = model.get_submodule(name)
    if getattr(layer, "base_layer", None) is not None:
        layer.lora_B["default"].data[3, 0] = torch.inf  # the update is a part of the layer's output
    else:
        layer.weight.data.view(-1)[3] = torch.inf
    assert first_not_finite(model, [batch()]) == place


def test_a_product_between_two_layers_that_overflows_is_the_input_of_the_second():
    model = small_model().half()
    for name in (
        "gate_proj",
        "up_proj",
    ):  # 1000 * 1000 is beyond float16's range, and both outputs are within
        layer = model.get_submodule(f"model.layers.0.mlp.{name}").base_layer
        layer.weight.data.fill_(0)
        layer.bias = torch.nn.Parameter(torch.full((layer.out_features,), 1000.0).half())
    assert first_not_finite(model, [batch()]) == "the input of model.layers.0.mlp.down_proj"


def test_a_model_that_is_sound_has_no_such_layer_and_keeps_no_hook():
    model = small_model()
    assert first_not_finite(model, [batch(), batch(4)]) is None and first_not_finite(model, []) is None
    assert not any(module._forward_hooks for module in model.modules())


def test_later_micro_batches_are_looked_at_too_and_none_after_the_one_that_overflows():
    model = small_model().float()
    model.model.embed_tokens.weight.data[17] = torch.inf  # a token that only the second batch has
    after = iter([batch(4), batch(9)])
    assert first_not_finite(model, after) == "the output of model.embed_tokens"
    later = iter([batch(9), pytest.fail])
    assert first_not_finite(model, later) is not None and next(later) is pytest.fail


# ---- what the run says and when it ends ------------------------------------------------------------------------


def test_float16_that_overflows_in_forward_ends_after_three_steps_and_names_the_layer(
    train, in_float16, overflowing
):
    in_float16()
    directory, err = train(code=2, model=overflowing(1e2, 1e5), max_steps=20, save_steps=1, **ONE_BATCH)
    assert "loss nan at step 3:" in err and err.count("\n") == 1
    assert f"the output of {DOWN} is beyond float16's range (65,504) without the adapter too" in err
    assert "--bf16 true" in err and "--bf16 false" in err and "learning_rate" not in err
    assert metrics(directory)[-1]["skipped_steps"] == 2  # as the third ends the run, it is not recorded


def test_one_step_that_overflows_in_forward_is_skipped_counted_and_told(train, in_float16, lose):
    in_float16()
    lose(2, 4, 5)
    directory, out = train(max_steps=7, save_steps=1, **ONE_BATCH)
    told = [line for line in out.splitlines() if "activation" in line]
    assert [line.split(":")[0] for line in told] == ["step 2", "step 4", "step 5"]
    records = metrics(directory)
    assert records[-1]["skipped_steps"] == 3
    assert ["loss" in record for record in records] == [True, False, True, False, False, True, True]  # no nan
    assert "; 3 skipped, with numbers beyond float16's range |" in (directory / "README.md").read_text()
    steps = [adapter(directory / f"checkpoint-{n}") for n in (1, 2, 3)]
    assert all(torch.equal(steps[0][key], value) for key, value in steps[1].items())
    assert not all(torch.equal(steps[1][key], value) for key, value in steps[2].items())


def test_a_loss_that_is_lost_where_no_layer_overflows_again_is_still_told_apart(train, in_float16, lose):
    in_float16()
    lose(2, 3, 4)
    _, err = train(code=2, max_steps=9, **ONE_BATCH)
    assert "loss nan, gradient norm nan at step 4: training diverged; lower learning_rate" in err


@pytest.mark.parametrize("bf16", ["false", "true"])
def test_without_scaling_the_first_step_ends_the_run_and_names_the_layer(train, overflowing, bf16):
    _, err = train(code=2, model=overflowing(1e20, 1e25), bf16=bf16, **ONE_BATCH)
    assert "at step 1:" in err and err.count("\n") == 1 and "learning_rate" not in err
    assert f"the output of {DOWN} is not finite without the adapter too; check that layer's weights" in err


def test_an_adapter_that_diverged_is_told_by_its_learning_rate_and_by_the_layer(train):
    # In bfloat16 the gradient overflows first on some CPUs, behind a forward pass that is finite.
    keys = dict(learning_rate=1e30, max_grad_norm=0, max_steps=50, save_steps=1, bf16="false")
    _, err = train(code=2, **keys | ONE_BATCH)
    assert "training diverged; lower learning_rate = 1e+30 (last good checkpoint: " in err
    assert "; not finite first: the " in err and "put of model.layers.0.self_attn." in err


def test_a_run_that_is_told_to_use_float16_is_told_to_leave_it_out(train, in_float16, overflowing):
    in_float16()
    _, err = train(code=2, model=overflowing(1e2, 1e5), fp16="true", **ONE_BATCH)
    assert "leave out fp16 and take --bf16 true" in err
