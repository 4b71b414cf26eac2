"""How many orders a decoder layer gives a GPU in one step, forward and backward, and how busy that keeps the
host. On a small batch a fast GPU waits for the host, so both numbers are limits.
"""

import tempfile
from collections import Counter

import pytest
import torch
from support.pretended_gpu import PretendedGpu
from torch.utils._python_dispatch import TorchDispatchMode

from minilora import CausalLM, LoraConfig, QuantConfig, add_lora, load_model, save_model, trainable_parameters
from minilora.formats.config_json import parse_config
from minilora.loss import causal_lm_loss
from minilora.recompute import set_recompute

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")

T4, H100 = (7, 5), (9, 0)


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked for: views and allocations too."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu, self.count = gpu, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.count += not self.gpu.paused  # while it is paused, kernels compute their numbers
        return operation(*arguments, **(options or {}))


def counts_of_a_step(layers: int, capability, policy: str, dropout: float) -> tuple[int, int, Counter]:
    """Return launches, operations and waits of the second step of a Mistral with so many layers."""
    sizes = dict(vocab_size=320, hidden_size=64, intermediate_size=128, max_position_embeddings=256)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=layers)
    model = CausalLM(parse_config(dict(model_type="mistral", sliding_window=None) | sizes | heads))
    model.init_weights(std=0.1)
    dtype = torch.float16 if capability == T4 else torch.bfloat16
    with tempfile.TemporaryDirectory() as directory, PretendedGpu(capability) as gpu:
        save_model(model.to(dtype), directory)
        model = load_model(directory, QuantConfig(), dtype, torch.device("cuda"))
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear")
        add_lora(model, lora)
        set_recompute(model.train(), policy)
        labels = torch.arange(48).view(1, 48)
        documents = torch.tensor([[0] * 20 + [1] * 28])
        input_ids = labels.pin_memory().to("cuda", non_blocking=True)

        def step() -> None:
            causal_lm_loss(model, input_ids, labels, documents).backward()
            for parameter in trainable_parameters(model).values():
                parameter.grad = None

        step()  # makes buffers and codebooks
        with gpu.during() as seen, Operations(gpu) as operations:
            step()
    return sum(seen.launches.values()), operations.count, seen.waits


@pytest.mark.parametrize(
    "capability, policy, dropout, launches, operations",
    [
        (H100, "off", 0.0, 80, 180),
        (H100, "off", 0.05, 90, 200),
        (H100, "full", 0.0, 115, 275),
        (H100, "selective", 0.0, 115, 275),
        (T4, "off", 0.0, 86, 215),
        (T4, "off", 0.05, 130, 265),
    ],
)
def test_a_layer_takes_few_launches_and_few_operations_of_the_host(
    capability, policy, dropout, launches, operations
):
    """Adapters on all seven products, 4 bits. The bounds are what was counted, and some 4 % more."""
    few, many = (counts_of_a_step(layers, capability, policy, dropout) for layers in (2, 4))
    assert (many[0] - few[0]) / 2 <= launches
    assert (many[1] - few[1]) / 2 <= operations
    assert not many[2]  # micro-batches wait for nothing
