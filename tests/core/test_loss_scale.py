"""The loss scale finds its place, and steps that overflow change nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.loss_scale import LossScale
from minilora.optim import make_optimizer

CPU = torch.device("cpu")


def gradients(flawed: bool) -> dict[str, torch.Tensor]:
    """One adapter's; a flaw is in one element of one tensor."""
    made = {"lora_A": torch.full((4, 8), 2.0), "lora_B": torch.full((8, 4), 3.0)}
    if flawed:
        made["lora_B"][5, 1] = torch.inf
    return made


def norm(parameters: dict[str, torch.nn.Parameter]) -> torch.Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters.values()])


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
@settings(deadline=None, max_examples=30)
@given(overflows=st.lists(st.booleans(), min_size=1, max_size=15), resume_at=st.integers(0, 14))
def test_a_step_is_left_out_exactly_where_a_gradient_overflows_and_moves_neither_parameters_nor_moments(
    optim, overflows, resume_at
):
    parameters = {
        name: torch.nn.Parameter(torch.ones_like(value)) for name, value in gradients(False).items()
    }
    reference = {name: torch.nn.Parameter(torch.ones_like(value)) for name, value in gradients(False).items()}
    optimizer, plain = (make_optimizer(optim, named, 0.1, 0.01) for named in (parameters, reference))
    scale, row = LossScale(CPU, enabled=True), 0
    for i, flawed in enumerate(overflows):
        if i == resume_at:
            saved, scale = scale.state_dict(), LossScale(CPU, enabled=True)
            scale.load_state_dict(saved)
        loss = sum(
            (p * g).sum() for p, g in zip(parameters.values(), gradients(flawed).values(), strict=True)
        )
        scale.backward(loss)
        scale.unscale(optimizer)
        scale.step(optimizer, loss.item(), norm(parameters))
        optimizer.zero_grad()
        row = row + 1 if flawed else 0
        assert scale.skipped_in_a_row == row
        if not flawed:
            for name, gradient in gradients(False).items():
                reference[name].grad = gradient
            plain.step()
        # S is a power of two, so scaling and unscaling lose nothing.
        assert all(torch.equal(parameters[name], value) for name, value in reference.items())
    assert (
        scale.skipped == sum(overflows) and scale.scale == 2.0 ** (16 - sum(overflows)) and not scale.diverged
    )


def test_a_rank_without_a_micro_batch_unscales_what_it_got_from_the_others():
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.tensor([2.0**16])
    scale = LossScale(CPU, enabled=True)
    scale.unscale(torch.optim.AdamW([parameter]))
    assert parameter.grad.item() == 1


def test_below_1_there_is_no_use_in_going_on():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([parameter])
    scale = LossScale(CPU, enabled=True)
    for step in range(1, 18):
        scale.backward((parameter * torch.inf).sum())
        scale.unscale(optimizer)
        scale.step(optimizer, torch.inf, parameter.grad.norm())
        assert scale.diverged == (step == 17)
    assert parameter.item() == 1 and "17 skipped" in scale.summary()


def test_without_scaling_the_first_step_that_is_not_finite_is_a_divergence_and_is_not_taken():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([parameter])
    scale = LossScale(CPU, enabled=False)
    scale.backward(parameter.sum())
    scale.unscale(optimizer)
    assert parameter.grad.item() == 1 and scale.scale == 1
    assert scale.step(optimizer, torch.tensor(0.5), parameter.grad.norm()) == [0.5, 1.0]
    moved = parameter.item()
    assert moved < 1 and not scale.diverged and scale.summary() == ""
    scale.step(optimizer, torch.nan, parameter.grad.norm())
    assert scale.diverged and parameter.item() == moved
