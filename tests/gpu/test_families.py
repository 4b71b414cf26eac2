"""Every family of models on a pretended GPU, with the weights of a transformers model."""

import pytest
import torch
from support.families import FAMILIES, same_model_here, transformers_model
from support.pretended_gpu import PretendedGpu
from support.tiny import adapted

from minilora.inference.generation import generate
from minilora.lora import trainable_parameters
from minilora.loss import causal_lm_loss
from minilora.optim import make_optimizer
from minilora.recompute import POLICIES, set_recompute

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")


@pytest.mark.parametrize(("family", "policy"), list(zip(FAMILIES, 3 * POLICIES, strict=True)))
@pytest.mark.parametrize("packed", [False, True])
def test_a_micro_batch_of_every_family_waits_for_nothing_and_mixes_no_devices(family, policy, packed):
    model = adapted(same_model_here(transformers_model(family)), quantized=True)
    ids = torch.arange(2 * 24).view(2, 24) % 97
    documents = torch.tensor([[0] * 10 + [1] * 14] * 2) if packed else None
    with PretendedGpu() as gpu:
        model.cuda()
        ids_there = ids.cuda()
        assert set_recompute(model, policy) == policy
        causal_lm_loss(model, ids_there, ids, documents).backward()  # fills the caches of the device
        with gpu.during() as record:
            causal_lm_loss(model, ids_there, ids, documents).backward()
    assert not record.waits and not gpu.faults and not record.variants
    assert record.launches["triton dequantize_kernel"] and record.launches["triton add_norm_backward_kernel"]
    for kernel in ("add_norm_kernel", "add_norm_backward_kernel"):
        # With a sum and without one, in the trial too; and the norms of Qwen3's heads have another width.
        assert len(gpu.signatures[kernel]) == (5 if "qwen3" in family else 4)
    for kernel in ("swiglu_kernel", "swiglu_backward_kernel", "cross_entropy_kernel"):
        assert len(gpu.signatures[kernel]) <= 2  # one, and one in the trial
    assert len(gpu.signatures["rope_kernel"]) <= 4  # forward and back, in the trial too


def test_a_model_on_the_second_gpu_trains_there_while_the_first_is_the_current_one():
    model = adapted(same_model_here(transformers_model("llama-gqa")), quantized=True)
    optimizer = make_optimizer("adamw_8bit", trainable_parameters(model), 1e-3, 0.0)
    for group in optimizer.param_groups:
        group["min_8bit_size"] = 1
    ids = torch.arange(2 * 24).view(2, 24) % 97
    with PretendedGpu(count=2) as gpu:
        model.to("cuda:1")
        layers = len(model.model.layers)
        for policy in (*POLICIES, [POLICIES[-1 - i % 4] for i in range(layers)]):  # the last: one of each
            set_recompute(model, policy)
            causal_lm_loss(model, ids.to("cuda:1"), ids).backward()
        optimizer.step()
        model.eval()
        generate(model, ids[:1, :5].to("cuda:1"), max_new_tokens=3)
        assert torch.cuda.current_device() == 0
    kernels = {name for name in gpu.launches if name.startswith("triton")}
    assert {"triton gemv_kernel", "triton adamw_8bit_kernel", "triton add_norm_backward_kernel"} <= kernels
    assert not gpu.faults, gpu.faults
