"""`fused: false` trains with the plain definitions, and ends where the fused forms end."""

import pytest
from support.project import adapter, metrics

from minilora.backend import choice, fused_lora


@pytest.fixture(autouse=True)
def fused_afterwards():
    yield
    choice.set_fused(True)


def test_plain_and_fused_trainings_end_in_the_same_adapter(train, monkeypatch):
    keys = dict(
        max_steps=5, learning_rate=1e-2, bf16="false", logging_steps=1, lora_dropout=0.1, lora_target="all"
    )
    fused, _ = train("fused", **keys)
    with monkeypatch.context() as patch:
        patch.setattr(fused_lora._FusedLora, "apply", lambda *_: pytest.fail("a fused form ran"))
        plain, _ = train("plain", fused="false", **keys)
    one, other = ([r["loss"] for r in metrics(d) if "loss" in r] for d in (fused, plain))
    assert one == pytest.approx(other, rel=1e-4) and one[4] < 0.99 * one[0]
    # AdamW divides a gradient by its own size: where rounding decides the sign, a step goes the other way.
    one, other = adapter(fused), adapter(plain)
    assert all(((one[k] - other[k]).abs() <= 1e-4 * other[k].abs().max()).float().mean() > 0.97 for k in one)


def test_a_run_goes_on_with_the_forms_that_it_began_with(train):
    train(max_steps=4, save_steps=2)
    _, err = train(code=2, max_steps=4, save_steps=2, fused="false", resume_from_checkpoint="latest")
    assert "fused is False here, True there" in err
