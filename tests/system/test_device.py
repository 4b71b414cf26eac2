"""The compute dtype follows the hardware, and the reason is said."""

import sys
from types import SimpleNamespace

import pytest
import torch

from minilora import UserError
from minilora.backend import triton_trial
from minilora.backend.choice import form_for
from minilora.system import device


@pytest.fixture(autouse=True)
def without_the_variables(monkeypatch):
    for name in ("MINILORA_CPU_DTYPE", "MINILORA_BACKEND", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU of some name and compute capability."""

    def pretend(name: str, capability: tuple[int, int], built_for: str = ""):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        monkeypatch.setattr(torch.cuda, "get_arch_list", built_for.split)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda *_: True
        )  # what PyTorch says of a T4, counting emulation

    return pretend


@pytest.mark.parametrize(
    "name, capability, dtype",
    [
        ("Tesla T4", (7, 5), torch.float16),
        ("Tesla V100", (7, 0), torch.float16),
        ("A100", (8, 0), torch.bfloat16),
        ("H200", (9, 0), torch.bfloat16),
    ],
)
def test_a_gpu_computes_in_bfloat16_from_capability_8_on_and_in_float16_before(gpu, name, capability, dtype):
    gpu(name, capability)
    placement = device.choose_placement()
    assert (placement.device.type, placement.dtype) == ("cuda", dtype)
    assert name in str(placement) and (dtype == torch.bfloat16 or "only emulates bfloat16" in str(placement))


@pytest.mark.parametrize(
    "flags, dtype",
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", torch.bfloat16),
        ("flags\t\t: fpu avx512f amx_bf16 amx_tile", torch.bfloat16),
        ("flags\t\t: fpu avx2 avx512f", torch.float32),
        ("Features\t: fp asimd bf16", torch.float32),
        ("", torch.float32),
    ],
)
def test_a_cpu_computes_in_bfloat16_only_with_instructions_for_it(monkeypatch, tmp_path, flags, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device.platform, "system", lambda: "Linux")
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(device, "Path", lambda _: tmp_path / "cpuinfo")
    placement = device.choose_placement()
    assert (placement.device.type, placement.dtype) == ("cpu", dtype)


def test_what_is_asked_for_wins_and_what_cannot_be_is_refused(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose_placement(bf16=True).dtype == torch.bfloat16
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        device.choose_placement(fp16=True)
    gpu("A100", (8, 0))
    assert device.choose_placement(fp16=True).dtype == torch.float16
    assert device.choose_placement(bf16=False, fp16=True).dtype == torch.float16
    with pytest.raises(UserError, match="both set"):
        device.choose_placement(bf16=True, fp16=True)


def test_bf16_false_requests_float32_and_bf16_unset_leaves_the_choice_to_the_hardware(gpu, monkeypatch):
    """As in Hugging Face's TrainingArguments."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "cpu_bfloat16_feature", lambda: "AMX")
    assert device.choose_placement().dtype == torch.bfloat16
    assert device.choose_placement(bf16=False).dtype == torch.float32
    assert str(device.choose_placement(bf16=False)) == "cpu, float32 (requested by bf16: false)"
    gpu("A100", (8, 0))
    assert device.choose_placement(bf16=False).dtype == torch.float32


@pytest.mark.parametrize("feature", [None, "AMX"])
@pytest.mark.parametrize("name, dtype", [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_variable_sets_the_dtype_of_a_cpu_and_keys_override_it(gpu, monkeypatch, feature, name, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "cpu_bfloat16_feature", lambda: feature)
    monkeypatch.setenv("MINILORA_CPU_DTYPE", name)
    placement = device.choose_placement()
    assert placement.dtype == dtype and "MINILORA_CPU_DTYPE" in str(placement)
    assert device.choose_placement(bf16=True).dtype == torch.bfloat16
    assert device.choose_placement(bf16=False).dtype == torch.float32
    gpu("Tesla T4", (7, 5))
    assert device.choose_placement().dtype == torch.float16


def test_an_unknown_value_of_the_variable_is_refused_and_an_empty_one_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "cpu_bfloat16_feature", lambda: None)
    monkeypatch.setenv("MINILORA_CPU_DTYPE", "")
    assert device.choose_placement().dtype == torch.float32
    monkeypatch.setenv("MINILORA_CPU_DTYPE", "float16")
    with pytest.raises(
        UserError, match="MINILORA_CPU_DTYPE = 'float16' is not known; choose float32 or bfloat16"
    ):
        device.choose_placement()


@pytest.mark.parametrize(
    ("cap", "feature"),
    [("AVX2", None), ("avx512_core", None), ("AVX512_CORE_AMX", "AMX"), ("ALL", "AMX"), (None, "AMX")],
)
def test_instructions_that_onednn_may_not_use_do_not_count(cap, feature, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu avx2 avx512_bf16 amx_bf16\n")
    monkeypatch.setattr(device.platform, "system", lambda: "Linux")
    monkeypatch.setattr(device, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if cap is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    assert device.cpu_bfloat16_feature() == feature


# ---- MINILORA_BACKEND ------------------------------------------------------------------------------------------------


def has_triton(monkeypatch, version: str | None) -> None:
    """Pretend that this version of Triton is installed, or none."""
    monkeypatch.setitem(sys.modules, "triton", version and SimpleNamespace(__version__=version))


@pytest.fixture
def triton(monkeypatch):
    has_triton(monkeypatch, "3.7.1")
    monkeypatch.setenv("MINILORA_BACKEND", "triton")


@pytest.mark.parametrize(
    "name, message", [("c", "'c' is not known; choose torch or triton"), (" ", "' ' is not known")]
)
def test_an_unknown_backend_is_refused_before_anything_runs_and_by_every_operation(
    monkeypatch, name, message
):
    monkeypatch.setenv("MINILORA_BACKEND", name)
    for refusing in (device.choose_placement, lambda: form_for(torch.ones(1), "quantize")):
        with pytest.raises(UserError, match=f"MINILORA_BACKEND = {message}"):
            refusing()


def test_an_empty_backend_is_none(monkeypatch):
    expected = form_for(torch.ones(1), "quantize")
    monkeypatch.setenv("MINILORA_BACKEND", "")
    assert (
        device.requested_backend(torch.device("cpu")) == ""
        and form_for(torch.ones(1), "quantize") == expected
    )


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("interpret", [None, "", "0"])
def test_triton_without_a_gpu_is_refused_unless_it_interprets(monkeypatch, interpret):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if interpret is not None:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    for refusing in (device.choose_placement, lambda: form_for(torch.ones(1), "rms_norm")):
        with pytest.raises(UserError, match="'triton' needs a GPU, .*; unset it, or set TRITON_INTERPRET=1"):
            refusing()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert device.choose_placement().device.type == "cpu" and form_for(torch.ones(1), "rms_norm") == "triton"


def test_triton_runs_on_a_gpu_and_only_where_it_is_installed(gpu, triton, monkeypatch):
    gpu("A100", (8, 0))
    assert device.choose_placement().device.type == "cuda"
    assert device.requested_backend(torch.device("cuda")) == "triton"
    has_triton(monkeypatch, None)
    with pytest.raises(UserError, match="Triton is not installed; unset it"):
        device.choose_placement()


@pytest.mark.parametrize(
    "version, capability, problem",
    [
        ("3.7.1", (7, 5), ""),
        ("3.4.0", (12, 0), ""),
        ("3.10.0+git123", (8, 6), ""),
        ("4.0", (9, 0), ""),
        ("3.3.1", (9, 0), "Triton 3.3.1 does not compile them, only 3.4 or newer"),
        ("2.9", (9, 0), "Triton 2.9 does not compile them"),
        ("3.7.1", (7, 0), "does not compile for compute capability 7.0, only from 7.5 on"),
        ("3.7.1", (6, 1), "does not compile for compute capability 6.1"),
        (None, (9, 0), "Triton is not installed"),
    ],
)
def test_the_kernels_need_triton_3_4_and_capability_7_5_and_one_line_says_what_is_missing(
    gpu, monkeypatch, capsys, version, capability, problem
):
    gpu("some GPU", capability)
    has_triton(monkeypatch, version)
    monkeypatch.setattr(triton_trial, "_problem_of_a_launch", lambda device: "")
    triton_trial.passed.cache_clear()
    here = torch.device("cuda", 0)
    assert problem in device.triton_problem(here) and bool(problem) == bool(device.triton_problem(here))
    for _ in range(3):
        assert form_for(Elsewhere(here), "quantize") == ("torch" if problem else "triton")
    said = capsys.readouterr().err
    assert said.count("\n") == bool(problem) and (problem in said)
    triton_trial.passed.cache_clear()
    monkeypatch.setenv("MINILORA_BACKEND", "triton")
    if problem:
        with pytest.raises(UserError, match=f"MINILORA_BACKEND = 'triton', but .*{problem}.*; unset it"):
            device.choose_placement()
    else:
        assert device.choose_placement().device.type == "cuda"


class Elsewhere:
    """Stands in for a tensor on a GPU."""

    is_cuda = True

    def __init__(self, device: torch.device):
        self.device = device


# ---- a GPU that PyTorch was not built for ----------------------------------------------------------------------------

NEW = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120"


@pytest.mark.parametrize(
    "capability, built_for",
    [
        ((7, 5), NEW),
        ((8, 9), NEW),  # runs what was made for 8.6
        ((9, 0), NEW),
        ((10, 3), NEW),
        ((12, 1), NEW),
        ((13, 0), NEW),  # compiled by the driver
        ((6, 0), "sm_50 sm_60 sm_70 sm_75"),
        ((9, 0), "sm_80 sm_90a"),
        ((9, 4), "gfx90a gfx942"),  # AMD's names say nothing about NVIDIA's numbers
        ((6, 0), ""),
    ],
)
def test_a_gpu_that_pytorch_was_built_for_is_used(gpu, capability, built_for):
    gpu("some GPU", capability, built_for)
    assert device.choose_placement().device.type == "cuda"


@pytest.mark.parametrize(
    "capability, built_for",
    [((6, 0), NEW), ((7, 0), NEW), ((11, 0), "sm_100 sm_120"), ((8, 0), "sm_86 sm_90")],
)
def test_a_gpu_that_pytorch_was_not_built_for_is_refused_in_one_line_before_anything_is_read(
    gpu, train, capability, built_for
):
    gpu("Tesla P100", capability, built_for)
    directory, err = train(code=2)
    name = ".".join(map(str, capability))
    assert err.count("\n") == 1 and f"Tesla P100 has compute capability {name}, for which this PyTorch" in err
    assert built_for in err and "CUDA_VISIBLE_DEVICES=-1" in err and not directory.exists()


@pytest.mark.usefixtures("triton")
def test_the_trainer_refuses_triton_without_a_gpu_before_it_writes(train, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    directory, err = train(code=2)
    assert err.count("\n") == 1 and "MINILORA_BACKEND" in err and not directory.exists()
