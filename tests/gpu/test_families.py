"""Every family of models on a pretended GPU, with the weights of a transformers model."""

import pytest
import torch
from support.families import FAMILIES, same_model_here, transformers_model
from support.pretended_gpu import PretendedGpu
from support.tiny import adapted

from minilora.loss import causal_lm_loss
from minilora.recompute import POLICIES, set_recompute

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")


@pytest.mark.parametrize(("family", "policy"), list(zip(FAMILIES, 2 * POLICIES, strict=True)))
@pytest.mark.parametrize("packed", [False, True])
def test_a_micro_batch_of_every_family_waits_for_nothing_and_mixes_no_devices(family, policy, packed):
    model = adapted(same_model_here(transformers_model(family)), quantized=True)
    ids = torch.arange(2 * 24).view(2, 24) % 97
    documents = torch.tensor([[0] * 10 + [1] * 14] * 2) if packed else None
    with PretendedGpu() as gpu:
        model.cuda()
        ids_there, documents = ids.cuda(), documents if documents is None else documents.cuda()
        assert set_recompute(model, policy) == policy
        causal_lm_loss(model, ids_there, ids, documents)  # fills the caches of the device
        with gpu.during() as record:
            causal_lm_loss(model, ids_there, ids, documents).backward()
    assert not record.waits and not gpu.faults
    for kernel, variants in gpu.signatures.items():
        # A norm of Qwen3's heads has another width than one of the whole model.
        assert len(variants) == (2 if "qwen3" in family and "rms_norm" in kernel else 1), kernel
