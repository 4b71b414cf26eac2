"""scripts/train.py on a pretended GPU: nothing lies on the wrong device, the host hardly ever waits, and the
numbers are those of the CPU.
"""

import shutil
from collections import Counter
from functools import partial

import pytest
from support.recorded_training import recorded_training

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")

T4, H100 = (7, 5), (9, 0)

CASES = {
    "float16 on a T4": (T4, {}),
    "float16, selective": (T4, dict(gradient_checkpointing="selective")),
    "float16, offload, packing": (T4, dict(gradient_checkpointing="offload", packing=True, cutoff_len=64)),
    "bfloat16 on an H100, evaluated": (H100, dict(gradient_checkpointing="full", eval_steps=1)),
    "bfloat16, offload": (H100, dict(gradient_checkpointing="offload")),
    "bfloat16, packing, selective": (
        H100,
        dict(packing=True, cutoff_len=64, gradient_checkpointing="selective"),
    ),
    "DoRA": (T4, dict(use_dora=True, lora_dropout=0)),
    "DoRA with dropout": (H100, dict(use_dora=True, gradient_checkpointing="full")),
    "a base in 8 bits": (T4, dict(quantization_bit=8)),
    "a base in 16 bits": (H100, dict(quantization_bit="none", optim="adamw_torch")),
    "an adapter on the head": (T4, dict(lora_target="q_proj,lm_head", optim="adamw_torch")),
    "frozen A": (H100, dict(lora_fa=True)),
}
# 8-bit moments need matrices of 4096 numbers: 64 of rank by 64 of width.
COMMON = dict(
    max_steps=2, quantization_bit=4, lora_dropout=0.1, lora_target="all", lora_rank=64, optim="adamw_8bit",
    gradient_checkpointing="off", per_device_train_batch_size=2, gradient_accumulation_steps=2, val_size=4,
    exact_match_samples=0, eval_steps=100,
)  # fmt: skip


@pytest.fixture
def train_on_gpu(train, trainer, monkeypatch):
    return partial(recorded_training, train, trainer, monkeypatch)


def check(run, keys: dict) -> None:
    """Assert that a run mixed no devices and let the GPU work without pauses, from the second step on."""
    assert not run.gpu.faults
    for step, micro_batches in list(zip(run.steps, run.micro_batches, strict=True))[1:]:
        assert not micro_batches.waits
        assert sum(step.waits.values()) == 1, step.waits
        assert not step.variants  # nothing is compiled again
    compiled = Counter(kernel for kernel, *_ in run.steps[0].variants)
    twice = {
        "add_norm_kernel",
        "add_norm_backward_kernel",
        "rope_kernel",
    }  # with a sum and without; forward, back; and each in its trial
    assert all(count <= 2 * (2 if kernel in twice else 1) for kernel, count in compiled.items()), compiled
    launched = run.steps[-1].launches
    assert ("triton adamw_8bit_kernel" in launched) == (keys["optim"] == "adamw_8bit")
    assert ("triton dequantize_kernel" in launched) == (keys["quantization_bit"] == 4)
    operations = "add_norm add_norm_backward rope swiglu swiglu_backward".split()
    operations += [] if "lm_head" in keys["lora_target"] else ["cross_entropy"]
    assert not {f"triton {operation}_kernel" for operation in operations} - launched.keys()


@pytest.mark.parametrize("case", CASES)
def test_training_mixes_no_devices_and_waits_for_the_gpu_once_a_step(case, train_on_gpu):
    capability, keys = CASES[case]
    check(train_on_gpu(capability, **COMMON | keys), COMMON | keys)


EQUAL = {
    "everything kept": dict(),
    "selective, packing": dict(gradient_checkpointing="selective", packing=True, cutoff_len=64),
    "full, DoRA": dict(gradient_checkpointing="full", use_dora=True),
    "offload, plain weights": dict(
        gradient_checkpointing="offload", quantization_bit="none", optim="adamw_torch"
    ),
    "a base in 8 bits": dict(quantization_bit=8),
}


@pytest.mark.parametrize("case", EQUAL)
def test_a_training_in_float32_gives_the_adapter_of_the_cpu_to_the_bit(
    case, train, train_on_gpu, monkeypatch
):
    """Dropout included. Kernels compute their definitions on a pretended GPU, so the CPU does that too: C would
    add in another order.
    """
    keys = COMMON | EQUAL[case] | dict(bf16=False)
    run = train_on_gpu(T4, name="gpu", **keys)
    check(run, keys)
    monkeypatch.setenv("MINILORA_BACKEND", "torch")
    directory, printed = train(name="cpu", **keys | dict(gradient_checkpointing="off"))
    files = [folder / "adapter_model.safetensors" for folder in (run.directory, directory)]
    assert files[0].read_bytes() == files[1].read_bytes()
    losses = [
        [line for line in text.splitlines() if "held-out loss" in line] for text in (run.printed, printed)
    ]
    assert losses[0] == losses[1] and losses[0]


def test_a_run_resumed_on_the_gpu_ends_as_if_it_had_not_been_stopped(train_on_gpu):
    keys = COMMON | dict(max_steps=2, save_steps=1, gradient_checkpointing="selective")
    whole = train_on_gpu(T4, name="whole", **keys)
    halves = whole.directory.with_name("halves")
    shutil.copytree(whole.directory, halves, ignore=shutil.ignore_patterns("checkpoint-2"))
    (halves / "adapter_model.safetensors").unlink()
    rest = train_on_gpu(T4, name="halves", **keys, resume_from_checkpoint="latest")
    assert len(rest.steps) == 1 and not rest.gpu.faults
    adapters = [run.directory / "adapter_model.safetensors" for run in (whole, rest)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
