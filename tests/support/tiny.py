"""Models of a few thousand parameters, adapters with values that hide nothing, and what comes of them."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from minilora import CausalLM, LoraConfig, add_lora, quantize_4bit, trainable_parameters
from minilora.formats.config_json import parse_config
from minilora.linear import Linear4bit
from minilora.lora import lora_layers
from minilora.loss import causal_lm_loss
from minilora.recompute import set_recompute
from support.families import same_model_here, transformers_model

# Forward and gradient: float32 sums in another order, as in test_model.
TOLERANCE = 1e-5
# After 20 AdamW steps: Adam divides by sqrt(v), so where a gradient is nearly zero its relative error is the
# error of the step. 1e-6 of relative gradient error, 20 steps of equal direction, and the 1 / sqrt(v)
# amplification stay below 1e-4 of the largest entry. Seen: 1e-5.
AFTER_20_STEPS = 1e-4


def tiny_model(seed: int = 0, **changes) -> CausalLM:
    config = dict(
        model_type="llama",
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = CausalLM(parse_config(config | changes)).eval()
    model.init_weights(std=0.1, seed=seed)
    return model


def randomize(model: nn.Module, seed: int = 0, scale: float = 0.1) -> None:
    """Give A and B values that no initialisation would, so that nothing is hidden by B = 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for name in layer.configs:
                for parameter in (layer.lora_A[name], layer.lora_B[name]):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def ids(*shape: int, vocab: int = 61) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(7))


def pair_with_peft(family: str, **lora):
    """The same weights and the same random adapter, here and in PEFT."""
    peft = pytest.importorskip("peft")
    theirs = transformers_model(family)
    ours = same_model_here(theirs)
    config = LoraConfig(**lora)
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(task_type="CAUSAL_LM", **lora | dict(target_modules=targets))
    )
    add_lora(ours, config)
    randomize(ours)
    with torch.no_grad():
        for name, layer in lora_layers(ours).items():
            twin = theirs.base_model.model.get_submodule(name)
            twin.lora_A["default"].weight.copy_(layer.lora_A["default"])
            twin.lora_B["default"].weight.copy_(layer.lora_B["default"])
    return ours, theirs


def adapter_pairs(ours, theirs):
    """(name, our A or B, PEFT's)"""
    for name, layer in lora_layers(ours).items():
        twin = theirs.base_model.model.get_submodule(name)
        yield name + ".lora_A", layer.lora_A["default"], twin.lora_A["default"].weight
        yield name + ".lora_B", layer.lora_B["default"], twin.lora_B["default"].weight


ALL_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


CASES = {
    "qv": dict(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj")),
    "all-linear": dict(r=3, lora_alpha=5, target_modules="all-linear"),
    "rslora": dict(r=8, lora_alpha=4, target_modules=ALL_SEVEN, use_rslora=True),
    "regex": dict(r=2, lora_alpha=2, target_modules=r".*layers\.[02]\.(self_attn\.q_proj|mlp\.down_proj)"),
}


def adapted(model: CausalLM, targets="all-linear", dropout=0.1, quantized=False) -> CausalLM:
    """The model with random adapters, ready to train."""
    if quantized:
        for name, layer in list(model.model.layers.named_modules()):
            if isinstance(layer, nn.Linear):
                bias = None if layer.bias is None else layer.bias.data
                model.model.layers.set_submodule(name, Linear4bit(quantize_4bit(layer.weight.data), bias))
    add_lora(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.normal_(0, 0.1)
    return model.train()


def small_model(layers=3, width=64, quantized=False, **lora) -> CausalLM:
    config = dict(
        model_type="llama",
        vocab_size=97,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
    )
    config |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    model = CausalLM(parse_config(config))
    model.init_weights(std=0.1)
    return adapted(model, quantized=quantized, **lora)


def gradients(
    model: CausalLM, policy: str | Sequence[str], B=2, T=17
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and every gradient under a policy, with the dropout of one seed; and the random state it leaves
    behind.
    """
    set_recompute(model, policy)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    ids = torch.randint(0, 97, (B, T))
    loss = causal_lm_loss(model, ids, ids)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trainable_parameters(model).items()} | {
        "random state": torch.get_rng_state()
    }


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that the tensors in an optimizer's state hold; what several parameters share, such as a codebook,
    counts once.
    """
    tensors = (
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
