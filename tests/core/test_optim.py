"""Schedules are transformers' and 8-bit moments bitsandbytes', number by number; states survive files; LoRA+
is PEFT's.
"""

import copy
import json
import shutil
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from support.pretended_gpu import PretendedGpu
from support.tiny import state_bytes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from minilora import UserError
from minilora.backend import native, native_trial
from minilora.lora import trainable_parameters
from minilora.loss import causal_lm_loss
from minilora.optim import (
    OPTIMIZERS,
    SCHEDULES,
    AdamW8bit,
    Schedule,
    make_optimizer,
    set_learning_rate,
)
from minilora.run.checkpoints import flatten, unflatten
from minilora.run.describe import describe_optimizer
from minilora.testing import weights

# Ours -> bitsandbytes'.
STATES = dict(exp_avg="state1", exp_avg_absmax="absmax1", exp_avg_sq="state2", exp_avg_sq_absmax="absmax2")
# Beside and on the bounds: 8-bit moments are for 4096 elements and more, blocks are of 256; rows that blocks
# span.
SHAPES = [(1,), (255,), (4095,), (4096,), (4097,), (16, 256), (41, 100), (3, 4099)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup, total", [(0, 10), (3, 10), (9, 10), (1, 1000)])
def test_every_schedule_equals_transformers_at_every_step(schedule, warmup, total):
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        # Both are a handful of float64 operations: 1e-12 is thousands of roundings.
        assert Schedule(schedule, 3e-4, total, warmup).learning_rate(step) == pytest.approx(
            scheduler.get_last_lr()[0], rel=1e-12, abs=1e-18
        )
        optimizer.step()
        scheduler.step()


# ---- 8-bit moments ---------------------------------------------------------------------------------------------------


_X = torch.tensor([1 + 2**-12])
CPU_HAS_FMA = bool(
    (_X.square().neg().add(_X, alpha=1 + 2**-12) != 0).any()
)  # else PyTorch rounds x^2, and cancels


@pytest.fixture(params=["compiled", "definition"])
def path(request, monkeypatch):
    """Both ways of a CPU. Where PyTorch rounds otherwise than the compiled functions do, only one is left."""
    if request.param == "definition":
        monkeypatch.setenv("MINILORA_BACKEND", "torch")
    elif not (native_trial.is_trusted("adamw_8bit") and CPU_HAS_FMA):
        pytest.skip("no C compiler, or a CPU without FMA: the definition is all there is")
    return request.param


def random_parameters(shapes: list[tuple[int, ...]], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(0.1 * torch.randn(shape, generator=generator)) for shape in shapes]


def assert_same_moments(ours: AdamW8bit, theirs, pairs) -> None:
    for mine, other in pairs:
        for name, their_name in STATES.items():
            assert (name in ours.state[mine]) == (their_name in theirs.state[other])
            if name in ours.state[mine]:
                assert torch.equal(ours.state[mine][name], theirs.state[other][their_name]), (
                    name,
                    tuple(mine.shape),
                )
        assert ours.state[mine]["step"] == theirs.state[other]["step"]


SIZES = (
    1.0,
    1e-3,
    1e12,
    1e-12,
    1.0,
    1e-22,
    1e-6,
    0.0,
    1e-3,
)  # of gradients; the square of 1e-22 is subnormal or 0


def gradient(shape: tuple[int, ...], step: int, which: int) -> Tensor | None:
    """Of one parameter at one step. Every few steps it has zeros, a block of them and single ones, or it is
    missing.
    """
    generator = torch.Generator().manual_seed(1000 * step + which)
    g = torch.randn(shape, generator=generator) * SIZES[which]
    if step % 7 == 3:
        g.view(-1)[:300] = 0
    return None if which == 6 and step % 3 == 1 else g


def test_8bit_moments_equal_bitsandbytes_to_the_bit_over_50_steps(path):
    bnb = pytest.importorskip("bitsandbytes")
    shapes = SHAPES + [(300, 1111)] * (path == "compiled")  # enough for a second thread
    ours, theirs = random_parameters(shapes), random_parameters(shapes)
    optimizer, reference = (
        make(parameters, lr=1.0, weight_decay=0.1)
        for make, parameters in ((AdamW8bit, ours), (bnb.optim.AdamW8bit, theirs))
    )
    for step in range(50):
        for i, shape in enumerate(shapes):
            ours[i].grad, theirs[i].grad = gradient(shape, step, i), gradient(shape, step, i)
        for each in (optimizer, reference):
            each.param_groups[0]["lr"] = Schedule("cosine", 1e-3, 50, 5).learning_rate(step)
            each.step()
    assert_same_moments(optimizer, reference, zip(ours, theirs, strict=True))
    for mine, other in zip(ours, theirs, strict=True):
        # The parameters differ by the root's last bit (MKL's in theirs) and where the corrections are
        # applied: an update by some 4 roundings, 2.4e-7 of at most 3e-3, and the parameter, 0.1, by its own
        # rounding a step. Seen: 4e-8.
        assert (mine - other).abs().max() <= 1e-6 * other.abs().max()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), lr=st.sampled_from([0.0, 1e-3]), weight_decay=st.sampled_from([0.0, 0.5]))
def test_8bit_moments_equal_bitsandbytes_whatever_the_gradients(data, lr, weight_decay):
    bnb = pytest.importorskip("bitsandbytes")
    shape = data.draw(st.sampled_from(SHAPES[2:]))
    gradients = data.draw(
        st.lists(weights(st.just(shape), (torch.float32,), blocksize=256), min_size=1, max_size=3)
    )
    (mine,), (other,) = random_parameters([shape]), random_parameters([shape])
    optimizer = AdamW8bit([mine], lr=lr, weight_decay=weight_decay)
    reference = bnb.optim.AdamW8bit([other], lr=lr, weight_decay=weight_decay)
    for g in gradients:
        mine.grad, other.grad = g.clone(), g.clone()
        optimizer.step()
        reference.step()
    assert_same_moments(optimizer, reference, [(mine, other)])
    assert (mine - other).abs().max() <= 1e-6 * other.abs().max()  # see above


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_tensors_updated_together_are_to_the_bit_as_if_alone_and_compiled_as_defined(data):
    shapes = data.draw(st.lists(st.sampled_from(SHAPES[2:]), min_size=1, max_size=3))
    plain, together, alone = (random_parameters(shapes) for _ in range(3))
    optimizers = [AdamW8bit(plain), AdamW8bit(together), *(AdamW8bit([parameter]) for parameter in alone)]
    for _ in range(2):
        for parameters in zip(plain, together, alone, strict=True):
            g = data.draw(weights(st.just(tuple(parameters[0].shape)), (torch.float32,), blocksize=256))
            for parameter in parameters:
                parameter.grad = g.clone()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MINILORA_BACKEND", "torch")
            optimizers[0].step()
        for optimizer in optimizers[1:]:
            optimizer.step()
    for one, two, three in zip(plain, together, alone, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_with_32bit_moments_only_it_is_pytorchs_adamw():
    ours, theirs = random_parameters(SHAPES), random_parameters(SHAPES)
    optimizer = AdamW8bit(ours, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, min_8bit_size=10**9)
    reference = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for step in range(20):
        for i, shape in enumerate(SHAPES):
            ours[i].grad, theirs[i].grad = gradient(shape, step, i), gradient(shape, step, i)
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert state_bytes(optimizer) == 8 * sum(p.numel() for p in ours)
        # 20 steps of at most 1.5e-2, each some 8 roundings of 2^-24 apart, and 20 roundings of the parameter
        # itself, up to 0.7.
        assert (mine - other).abs().max() <= 20 * (8 * 1.5e-2 + 0.7) * 2**-24


def test_final_loss_is_within_a_percent_of_32bit_adamws():
    # LoRA in small: y = x (B A)^T is fitted to a target of rank 8 with noise, whose variance of 0.25 is what
    # remains.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 512, generator=generator)
    target = 0.02 * torch.randn(512, 8, generator=generator) @ torch.randn(8, 512, generator=generator)
    y = x @ target.T + 0.5 * torch.randn(512, 512, generator=generator)
    losses = {}
    for name in ("adamw_torch", "adamw_8bit"):
        A = nn.Parameter(
            torch.randn(8, 512, generator=torch.Generator().manual_seed(1)) / 512**0.5
        )  # 4096 elements: 8 bits
        B = nn.Parameter(torch.zeros(512, 8))
        optimizer = make_optimizer(name, {"lora_A": A, "lora_B": B}, lr=3e-2, weight_decay=0.0)
        for step in range(100):
            set_learning_rate(optimizer, Schedule("cosine", 3e-2, 100, 10).learning_rate(step))
            rows = torch.arange(64) + 64 * (step % 8)
            (x[rows] @ A.T @ B.T - y[rows]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[name] = (x @ A.T @ B.T - y).square().mean().item()
    assert losses["adamw_torch"] < 0.3 < 1.5 < y.square().mean()  # it was learned
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw_torch"], rel=0.01)


def test_states_take_two_bytes_and_a_sixty_fourth_a_parameter(path):
    bnb = pytest.importorskip("bitsandbytes")
    parameters = random_parameters([(8, 4096), (1024, 8), (5000,), (64, 63)])
    optimizer, reference = AdamW8bit(parameters), bnb.optim.AdamW8bit(parameters)
    assert state_bytes(optimizer) == 0  # nothing before the first step
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    for each in (optimizer, reference):
        each.step()
    blocks = 8 * 4096 // 256 + 1024 * 8 // 256 + 20  # 5000 elements have 20 blocks
    expected = (
        2 * (8 * 4096 + 1024 * 8 + 5000) + 2 * 4 * blocks + 8 * 64 * 63
    )  # the last keeps float32 moments
    assert state_bytes(optimizer) == expected
    assert state_bytes(reference) == expected + 2 * 4 * 256  # it refers to its two codes from every state
    for parameter in parameters[:2]:
        assert (
            sum(t.nbytes for t in optimizer.state[parameter].values() if isinstance(t, Tensor))
            == (2 + 8 / 256) * parameter.numel()
        )


def test_a_parameter_without_a_gradient_stays_and_has_no_state(path):
    still, moving = random_parameters([(4096,), (4096,)])
    before = still.clone()
    optimizer = AdamW8bit([still, moving], weight_decay=0.5)
    moving.grad = torch.ones(4096)
    optimizer.step()
    assert torch.equal(still, before) and still not in optimizer.state
    still.grad = torch.ones(4096)
    optimizer.step()
    assert (optimizer.state[still]["step"], optimizer.state[moving]["step"]) == (1, 2)


def test_a_closure_is_run_with_gradients():
    (parameter,) = random_parameters([(4096,)])
    optimizer = AdamW8bit([parameter])

    def closure() -> Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    expected = parameter.square().sum().item()
    assert optimizer.step(closure).item() == expected and optimizer.state[parameter]["step"] == 1


@pytest.mark.parametrize(
    "wrong", [dict(lr=-1.0), dict(eps=-1e-8), dict(weight_decay=-0.1), dict(betas=(0.9, 1.0))]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        AdamW8bit(random_parameters([(3,)]), **wrong)


@pytest.mark.parametrize("parameter", [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(4, 3).T])
def test_parameters_that_are_not_contiguous_float32_are_refused(parameter):
    parameter = nn.Parameter(parameter)
    parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(UserError, match="contiguous float32"):
        AdamW8bit([parameter]).step()


def test_a_compiled_adamw_with_other_bits_is_not_used(monkeypatch, tmp_path):
    if not native_trial.is_trusted("adamw_8bit"):
        pytest.skip("no C compiler: the definition is all there is")
    spoilt = tmp_path / "native.c"
    for included in native._INCLUDED:
        shutil.copy(included, tmp_path)
    spoilt.write_text(native._SOURCE.read_text().replace("fmaf(a.rest1, g, ", "(a.rest1 * g + "))
    assert spoilt.read_text() != native._SOURCE.read_text()
    caches = native._functions, native_trial.is_trusted
    try:
        with monkeypatch.context() as patch:
            patch.setattr(native, "_SOURCE", spoilt)
            patch.setenv("XDG_CACHE_HOME", str(tmp_path))
            for cache in caches:
                cache.cache_clear()
            assert native._functions() and not native_trial.is_trusted("adamw_8bit")
    finally:
        for cache in caches:
            cache.cache_clear()


# ---- kernels write through addresses ---------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch that run."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += 1
        return function(*arguments, **(keywords or {}))


def operations_of_a_step(tensors: int) -> int:
    parameters = random_parameters([(8, 512)] * tensors)
    optimizer = AdamW8bit(parameters)
    for step in range(2):
        for i, parameter in enumerate(parameters):
            parameter.grad = gradient((8, 512), step, i)
        with Operations() as operations:
            optimizer.step()
    return operations.count


def test_a_compiled_step_runs_as_many_operations_for_two_tensors_as_for_six():
    if not native_trial.is_trusted("adamw_8bit"):
        pytest.skip("no C compiler: the definition loops over tensors")
    assert operations_of_a_step(2) == operations_of_a_step(6)


def test_a_step_on_a_gpu_is_one_launch_and_one_copy_for_any_number_of_tensors():
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")
    with PretendedGpu() as gpu:
        parameters = [nn.Parameter(torch.ones(8, 512, device="cuda")) for _ in range(5)]
        optimizer = AdamW8bit(parameters)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()  # makes the states and the tables of codes
        with gpu.during() as record:
            optimizer.step()
    assert record.launches == {"triton adamw_8bit_kernel": 1, "copy": 1}
    assert not record.waits and not gpu.faults


def replace_parameters(parameters, optimizer):
    for parameter in parameters:
        parameter.data = parameter.data.clone()


def replace_moments(parameters, optimizer):
    for state in optimizer.state.values():
        state.update({name: value.clone() for name, value in state.items() if isinstance(value, Tensor)})


def load_a_state(parameters, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def lose_a_gradient(parameters, optimizer):
    parameters[1].grad = None


def turn_a_gradient(parameters, optimizer):
    """The same numbers, column by column in memory."""
    parameters[1].grad = parameters[1].grad.T.contiguous().T


def move_to_a_second_group(parameters, optimizer):
    group = optimizer.param_groups[0]
    optimizer.param_groups.append(group | dict(lr=3e-3, params=group["params"][1:]))
    group["params"] = group["params"][:1]


CHANGES = [
    replace_parameters,
    replace_moments,
    load_a_state,
    lose_a_gradient,
    turn_a_gradient,
    move_to_a_second_group,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_after_a_change_is_the_definitions_and_leaves_what_was_replaced(change, monkeypatch):
    if not (native_trial.is_trusted("adamw_8bit") and CPU_HAS_FMA):
        pytest.skip("no C compiler, or a CPU without FMA: the definition is all there is")
    sides = []
    for backend in (None, "torch"):
        if backend:
            monkeypatch.setenv("MINILORA_BACKEND", backend)
        parameters = random_parameters([(8, 520), (41, 100), (5000,)])
        optimizer = AdamW8bit(parameters, lr=1e-3)
        for step in range(4):
            for i, parameter in enumerate(parameters):
                parameter.grad = gradient(tuple(parameter.shape), step, i)
            if step == 2:
                old = [p.detach() for p in parameters]
                states = [optimizer.state[p] for p in parameters]
                old += [value for s in states for value in s.values() if isinstance(value, Tensor)]
                kept = [tensor.clone() for tensor in old]
                change(parameters, optimizer)
                now = [p.data_ptr() for p in parameters]
                now += [
                    v.data_ptr()
                    for p in parameters
                    for v in optimizer.state[p].values()
                    if isinstance(v, Tensor)
                ]
                replaced = [
                    i for i, (tensor, at) in enumerate(zip(old, now, strict=True)) if tensor.data_ptr() != at
                ]
            optimizer.step()
        assert all(torch.equal(old[i], kept[i]) for i in replaced)
        assert len(replaced) == {replace_parameters: 3, replace_moments: 12, load_a_state: 12}.get(change, 0)
        sides.append([*parameters, *(v for p in parameters for v in optimizer.state[p].values())])
    for one, two in zip(*sides, strict=True):
        assert torch.equal(one, two) if isinstance(one, Tensor) else one == two


def test_a_copied_optimizer_trains_the_copied_parameters(path):
    parameters = random_parameters([(4096,)])
    optimizer = AdamW8bit(parameters)
    parameters[0].grad = torch.ones(4096)
    optimizer.step()
    before = parameters[0].clone()
    copied_parameters, copied = copy.deepcopy((parameters, optimizer))
    copied_parameters[0].grad = torch.ones(4096)
    copied.step()
    assert torch.equal(parameters[0], before) and not torch.equal(copied_parameters[0], before)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq_absmax"])
def test_a_moment_that_is_replaced_by_a_shorter_one_is_not_written_past(name):
    (parameter,) = random_parameters([(4096,)])
    optimizer = AdamW8bit([parameter])
    parameter.grad = torch.ones(4096)
    optimizer.step()
    state = optimizer.state[parameter]
    state[name] = state[name][1:].clone()
    with pytest.raises(AssertionError):
        optimizer.step()


def test_a_parameter_that_shrank_in_its_place_is_not_written_past():
    (parameter,) = random_parameters([(8192,)])
    optimizer = AdamW8bit([parameter])
    parameter.grad = torch.ones(8192)
    optimizer.step()
    parameter.data = parameter.data[:4096]
    with pytest.raises(AssertionError):
        optimizer.step()


def test_pytorch_knows_that_a_step_wrote_to_the_parameters(path):
    still, small, large = parameters = random_parameters([(4096,), (100,), (4096,)])
    optimizer = AdamW8bit(parameters)
    small.grad, large.grad = torch.ones(100), torch.ones(4096)
    versions, loss = [p._version for p in parameters], large.square().sum()
    optimizer.step()
    assert [p._version > before for p, before in zip(parameters, versions, strict=True)] == [
        False,
        True,
        True,
    ]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- states in files -------------------------------------------------------------------------------------------------


def through_files(state_dict: dict) -> dict:
    """A state dict as it comes back from a JSON and a safetensors file."""
    tree, tensors = flatten(state_dict)
    return unflatten(json.loads(json.dumps(tree)), load(save(tensors)))


@pytest.mark.parametrize("name", OPTIMIZERS)  # paged ones failed to resume for others
def test_every_optimizer_continues_from_files_as_if_never_stopped(name):
    if "bnb" in name or "paged" in name:
        pytest.importorskip("bitsandbytes")

    def started(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        names = ("lora_A.0", "lora_B.0", "lora_A.1", "lora_B.1", "magnitude")
        return make_optimizer(
            name, dict(zip(names, parameters, strict=True)), 1e-3, 0.1, loraplus_lr_ratio=4.0
        )

    def take_steps(optimizer, parameters: list[nn.Parameter], steps: range) -> None:
        for step in steps:
            for i, parameter in enumerate(parameters):
                parameter.grad = gradient(tuple(parameter.shape), step, i)
            set_learning_rate(optimizer, 1e-3 / (1 + step))
            optimizer.step()

    shapes = [(8, 520), (520, 8), (4, 100), (100, 4), (4097,)]
    parameters = random_parameters(shapes)
    optimizer = started(parameters)
    take_steps(optimizer, parameters, range(5))
    saved = through_files(optimizer.state_dict())
    resumed_parameters = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = started(resumed_parameters)
    resumed.load_state_dict(saved)
    take_steps(optimizer, parameters, range(5, 10))
    take_steps(resumed, resumed_parameters, range(5, 10))
    for one, other in zip(parameters, resumed_parameters, strict=True):
        assert torch.equal(one, other)
        for key, value in optimizer.state[one].items():
            same = (
                torch.equal(value, resumed.state[other][key])
                if isinstance(value, Tensor)
                else value == resumed.state[other][key]
            )
            assert same and type(value) is type(resumed.state[other][key]), key
            assert not isinstance(value, Tensor) or value.dtype == resumed.state[other][key].dtype


def test_a_loaded_state_is_a_copy_and_keeps_its_dtypes():
    (parameter,) = random_parameters([(5000,)])
    optimizer = AdamW8bit([parameter])
    parameter.grad = torch.ones(5000)
    optimizer.step()
    state_dict = optimizer.state_dict()
    (twin,) = random_parameters([(5000,)])
    loaded = AdamW8bit([twin])
    loaded.load_state_dict(state_dict)
    state = loaded.state[twin]
    assert {name: value.dtype for name, value in state.items() if name != "step"} == dict(
        exp_avg=torch.uint8,
        exp_avg_absmax=torch.float32,
        exp_avg_sq=torch.uint8,
        exp_avg_sq_absmax=torch.float32,
    )
    before = state["exp_avg_absmax"].clone()
    parameter.grad.mul_(7)
    optimizer.step()
    assert torch.equal(state["exp_avg_absmax"], before) and state["step"] == 1


# ---- by name ---------------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="sgd"):
        make_optimizer("sgd", {"w": nn.Parameter(torch.zeros(3))}, 1e-3, 0.0)


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_a_missing_bitsandbytes_is_told_with_the_way_to_get_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=f"{name}.*pip install bitsandbytes"):
        make_optimizer(name, {"w": nn.Parameter(torch.zeros(3))}, 1e-3, 0.0)


def test_without_cuda_the_paged_optimizer_is_the_plain_one_and_says_so():
    bnb = pytest.importorskip("bitsandbytes")
    optimizer = make_optimizer("paged_adamw_8bit", {"w": nn.Parameter(torch.zeros(3))}, 1e-3, 0.0)
    assert type(optimizer) is bnb.optim.AdamW8bit
    line = describe_optimizer("paged_adamw_8bit", torch.device("cpu"))
    assert "not paged" in line and "cpu" in line and "\n" not in line
    assert "not paged" not in describe_optimizer("paged_adamw_8bit", torch.device("cuda", 0))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_name_is_described_in_one_line(name):
    line = describe_optimizer(name, torch.device("cpu"), loraplus_lr_ratio=16.0)
    assert "AdamW" in line and line.endswith("B learns at 16 times the rate (LoRA+)") and "\n" not in line


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_the_paged_optimizer_pages():
    bnb = pytest.importorskip("bitsandbytes")
    parameter = nn.Parameter(torch.zeros(100_000, device="cuda"))
    optimizer = make_optimizer("paged_adamw_8bit", {"w": parameter}, 1e-3, 0.0)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert type(optimizer) is bnb.optim.PagedAdamW8bit and optimizer.state[parameter]["state1"].is_paged


# ---- LoRA+ -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_group_learns_at_its_multiple_of_the_rate(name):
    if "bnb" in name or "paged" in name:
        pytest.importorskip("bitsandbytes")
    parameters = {"q.lora_A.default": (4, 8), "q.lora_B.default": (8, 4), "q.magnitude": (8,)}
    parameters = {key: nn.Parameter(torch.ones(shape)) for key, shape in parameters.items()}
    optimizer = make_optimizer(name, parameters, 1e-3, 0.0, loraplus_lr_ratio=16.0)
    for rate in (1e-3, 3e-4, 0.0):
        set_learning_rate(optimizer, rate)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert [rates[id(p)] for p in parameters.values()] == [rate, 16 * rate, 16 * rate]
    assert optimizer.param_groups[0]["params"] == [
        parameters["q.lora_A.default"]
    ]  # the first group's rate is the one to print


@pytest.mark.parametrize("ratio", [None, 1.0])
def test_without_loraplus_all_parameters_are_one_group(ratio):
    parameters = {"lora_A": nn.Parameter(torch.ones(4, 8)), "lora_B": nn.Parameter(torch.ones(8, 4))}
    (group,) = make_optimizer("adamw_8bit", parameters, 1e-3, 0.0, ratio).param_groups
    assert group["params"] == list(parameters.values()) and group["lr"] == 1e-3


def test_5_loraplus_steps_equal_pefts():
    pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer
    from support.families import relative_error
    from support.tiny import AFTER_20_STEPS, CASES, adapter_pairs, pair_with_peft

    ours, theirs = pair_with_peft("llama-gqa", **CASES["all-linear"])
    optimizer = make_optimizer(
        "adamw_torch", trainable_parameters(ours), lr=1e-4, weight_decay=0.01, loraplus_lr_ratio=16.0
    )
    reference = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.01
    )
    start = {name: mine.detach().clone() for name, mine, _ in adapter_pairs(ours, theirs)}
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        batch = torch.randint(0, 97, (2, 16), generator=generator)
        (causal_lm_loss(ours, batch, batch) / 30).backward()
        theirs(input_ids=batch, labels=batch).loss.backward()
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    moved = {"A": 0.0, "B": 0.0}
    for name, mine, other in adapter_pairs(ours, theirs):
        assert relative_error(mine, other) <= AFTER_20_STEPS, name
        moved[name[-1]] = max(moved[name[-1]], (mine - start[name]).abs().max().item())
    assert moved["B"] > 8 * moved["A"]  # 16 times, but for the signs of the gradients
