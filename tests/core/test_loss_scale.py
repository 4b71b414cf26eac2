"""The loss scale finds its place, and steps that overflow change nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pretended_gpu import PretendedGpu

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


@settings(deadline=None, max_examples=30)
@given(overflows=st.lists(st.booleans(), min_size=1, max_size=12))
def test_parameters_and_state_are_those_of_the_usual_recipe_with_pytorchs_scaler(overflows):
    """unscale_, step, update, as PyTorch's documentation has it; S doubles after three good steps in a row."""

    class Scaler(torch.amp.GradScaler):
        def __init__(self, device, enabled):
            super().__init__(device, growth_interval=3, enabled=enabled)

    with pytest.MonkeyPatch.context() as patch:
        plain = Scaler("cpu", True)
        patch.setattr(torch.amp, "GradScaler", Scaler)
        scale = LossScale(CPU, enabled=True)
    ours, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizers = torch.optim.AdamW([ours], fused=True), torch.optim.AdamW([theirs], fused=True)
    for overflow in overflows:
        gradient = torch.tensor([1.0, -2.0, torch.inf if overflow else 0.5])
        scale.backward((ours * gradient).sum())
        scale.unscale(optimizers[0])
        scale.step(optimizers[0], 1.0, ours.grad.norm())
        plain.scale((theirs * gradient).sum()).backward()
        plain.unscale_(optimizers[1])
        plain.step(optimizers[1])
        plain.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert torch.equal(ours, theirs) and scale.scale == plain.get_scale()
        assert scale.state_dict()["scaler"] == plain.state_dict()


def test_a_step_waits_for_the_gpu_once():
    with PretendedGpu() as gpu:
        parameter = torch.nn.Parameter(torch.ones(5, device="cuda"))
        for optim in ("adamw_torch", "adamw_8bit"):
            optimizer = make_optimizer(optim, {"p": parameter}, 0.1, 0.0)
            for enabled in (False, True):
                scale = LossScale(parameter.device, enabled)
                with gpu.during() as record:
                    scale.backward((parameter * 2).sum())
                    scale.unscale(optimizer)
                    loss, norm = scale.step(optimizer, parameter.detach().sum(), parameter.grad.norm())
                    assert math.isfinite(loss) and norm > 0 and not scale.diverged and scale.scale >= 1
                assert sum(record.waits.values()) == 1 and not gpu.faults
