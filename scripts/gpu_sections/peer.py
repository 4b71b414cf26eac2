"""The same training step in the usual stack: transformers, PEFT and bitsandbytes.

Both sides have the same random weights in NF4, the same shape of adapter, AdamW with 8-bit moments, and full
recompute. First their losses on the same tokens are compared: a faster step that computes something else is
no result. The usual stack runs as its Trainer runs it: norms and head in float32, under autocast.
"""

import re
from importlib import import_module

import torch
from torch import Tensor, nn

from gpu_sections.card import Card, empty_memory
from gpu_sections.models import (
    LORA,
    MISTRAL_7B,
    OPTIMIZER,
    TINY,
    Measured,
    Side,
    loss_scale,
    measure,
    our_side,
    random_model,
    random_rows,
    random_weights,
)
from gpu_sections.section import Check, Skip
from minilora.config import ModelConfig
from minilora.formats.config_json import parse_config
from minilora.recompute import set_recompute

OURS, PEER = "minilora", "the usual stack"
SHAPES = ((4, 1024), (1, 1024))
# Each side rounds some 700 times to 2^-9, in another order; sqrt(700) 2^-9 = 5 % is far more than the mean
# over thousands of tokens differs by.
SAME_LOSS = 0.02
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def usual_stack(check: Check) -> None:
    """Time both sides on the same work, one after the other: two models of 7B may not fit together."""
    for package in ("bitsandbytes", "accelerate", "transformers", "peft"):
        try:
            import_module(package)
        except Exception as error:  # Their imports run code for the card, and fail in many ways.
            raise Skip(f"{package} cannot be imported ({type(error).__name__}: {error})") from error
    sizes = TINY if check.tiny else MISTRAL_7B
    found = {name: measure_side(check, name, sizes) for name in (OURS, PEER)}
    for shape in SHAPES:
        ours, theirs = (found[name][shape] for name in (OURS, PEER))
        if ours is None or theirs is None:
            continue
        gap, batch = abs(ours.loss - theirs.loss) / theirs.loss, f"{shape[0]} x {shape[1]}"
        check.claim(f"{batch}: both sides have the same loss, within {SAME_LOSS:.0%}", gap <= SAME_LOSS)
        times_less = {"time": theirs.seconds / ours.seconds, "memory": theirs.allocated / ours.allocated}
        check.row(**{f"{OURS}: times less": batch} | times_less)


def measure_side(check: Check, name: str, sizes: dict) -> dict[tuple[int, int], Measured | None]:
    """Load one side, report its steps, and free it."""
    side = ours(sizes, check.card) if name == OURS else theirs(sizes, check.card)
    found = {}
    for batch, length in SHAPES:
        rows = random_rows(sizes, batch, 64 if check.tiny else length)
        step = found[batch, length] = measure(side, rows, repeat=1 if check.tiny else 3)
        row = {"batch": f"{batch} x {length}", "side": name, "tokens/s": "out of memory"}
        if step is not None:
            row |= {"tokens/s": batch * len(rows[0].input_ids) / step.seconds, "step, ms": 1e3 * step.seconds}
            row |= {"allocated GiB": step.allocated / 2**30, "reserved GiB": step.reserved / 2**30}
            row |= {"loss": step.loss}
        check.row(**row)
    del side
    empty_memory()
    return found


def ours(sizes: dict, card: Card) -> Side:
    model = random_model(sizes, card)
    set_recompute(model, "full")
    return our_side(model, card)


def theirs(sizes: dict, card: Card) -> Side:
    """Return the usual stack's side, as PEFT's documentation prepares it."""
    import bitsandbytes
    import peft

    model = peer_model(parse_config(sizes), sizes, card)
    model = peft.prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    config = peft.LoraConfig(
        r=LORA.r, lora_alpha=LORA.lora_alpha, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(trainable, **OPTIMIZER)

    def loss_of(ids: Tensor, labels: Tensor, documents: None) -> Tensor:
        with torch.autocast(card.device.type, card.dtype):
            return model(input_ids=ids, labels=ids).loss

    return Side(loss_of, trainable, optimizer, loss_scale(card), card.device, padding_free=False)


def peer_model(config: ModelConfig, sizes: dict, card: Card) -> nn.Module:
    """Return transformers' model with the same random weights, its linear layers in bitsandbytes' NF4."""
    import accelerate
    import bitsandbytes as bnb
    import transformers

    settings = transformers.AutoConfig.for_model(**sizes, use_cache=False)
    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(settings)
    quant = dict(compress_statistics=True, quant_type="nf4")
    for name, value in random_weights(config, card):
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(parent)
        if re.search(r"_proj$", parent):
            shape = layer.in_features, layer.out_features
            layer = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=card.dtype, device="meta", **quant)
            layer.weight = bnb.nn.Params4bit(value, requires_grad=False, **quant).to(card.device)
            model.set_submodule(parent, layer)
        else:
            setattr(layer, leaf, nn.Parameter(value, requires_grad=False))
    model.is_loaded_in_4bit = True  # which PEFT asks for
    for module in model.modules():  # RoPE's frequencies
        for leaf, buffer in module.named_buffers(recurse=False):
            module.register_buffer(leaf, buffer.to(card.device), persistent=False)
    return model
