"""The two sides of a benchmark: a loaded model that trains on examples, ours or the usual stack's.

Each side runs as its users run it: ours as scripts/train.py does, with large freed blocks returned to the
system; the peer as PEFT's and bitsandbytes' documentation shows, in train() mode from the first forward on
(docs/parity.md says what eval() does to bitsandbytes' layers on some CPUs). The peer pads the examples of a
step to the longest and masks the padding, as transformers' collators do.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minilora import LoraConfig, QuantConfig, add_lora, load_model, trainable_parameters
from minilora.backend.copies import to_device
from minilora.data.examples import Example, batch_for
from minilora.loss import IGNORE_INDEX, causal_lm_loss
from minilora.memory.allocator import compiles_kernels, limit_compiled_kernels
from minilora.optim import make_optimizer
from minilora.recompute import set_recompute
from minilora.system.device import Placement

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
PAD_ID = 0  # of no matter: padding is never learned, and no token sees it


@dataclass(frozen=True)
class Side:
    """A loaded model, ready to train."""

    loss_of: Callable[[list[Example]], Tensor]  # the mean loss of the learned tokens, () float32
    trainable: dict[str, nn.Parameter]  # by the same names on both sides
    optimizer: torch.optim.Optimizer

    def gradients(self, examples: list[Example]) -> tuple[float, dict[str, Tensor]]:
        """Return the loss and every gradient that is not zero, in float32 on the CPU."""
        loss = self.loss_of(examples)
        loss.backward()
        found = {name: p.grad.float().cpu() for name, p in self.trainable.items() if p.grad.any()}
        self.optimizer.zero_grad()
        return loss.item(), found

    def step(self, examples: list[Example]) -> None:
        self.loss_of(examples).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


# ---- ours --------------------------------------------------------------------------------------------------


def load_ours(options: argparse.Namespace, placement: Placement) -> Side:
    """Load our side, as scripts/train.py does."""
    limit_compiled_kernels()
    quant, device = QuantConfig() if options.quantization_bit == "4" else None, placement.device
    model = load_model(options.model, quant, placement.dtype, device)
    torch.manual_seed(1)
    add_lora(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS))
    set_recompute(model, options.gradient_checkpointing)
    named = trainable_parameters(model.train())
    optimizer = make_optimizer(options.optim, named, lr=2e-4, weight_decay=0.0)
    rounded = compiles_kernels(placement.dtype, device.type)

    def mean_loss(examples: list[Example]) -> Tensor:
        batch = batch_for(device, examples, PAD_ID, rounded)
        return causal_lm_loss(model, *batch) / sum(e.supervised for e in examples)

    return Side(mean_loss, named, optimizer)


# ---- the usual stack ---------------------------------------------------------------------------------------


def load_peer(options: argparse.Namespace, placement: Placement) -> Side:
    """Load the same in transformers + bitsandbytes + PEFT, with the same A."""
    model = adapted_in_peft(load_in_transformers(options, placement), options)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named = {re.sub(r"base_model\.model\.|\.weight$", "", name): p for name, p in named.items()}
    torch.manual_seed(1)
    for name, parameter in named.items():
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(parameter, a=5**0.5)
    optimizer = peer_optimizer(options.optim)(named.values(), lr=2e-4, weight_decay=0.0)

    def mean_loss(examples: list[Example]) -> Tensor:
        batch = {name: to_device(t, placement.device) for name, t in padded(examples).items()}
        return model(**batch).loss

    return Side(mean_loss, named, optimizer)


def padded(examples: list[Example]) -> dict[str, Tensor]:
    """Return input_ids, labels and attention_mask, (Bt, T), as transformers wants them.

    Without padding there is no mask, which is faster.
    """
    ids = [torch.from_numpy(e.input_ids).long() for e in examples]
    learned = [torch.from_numpy(e.loss_mask) for e in examples]
    labels = [i.where(m, IGNORE_INDEX) for i, m in zip(ids, learned, strict=True)]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD_ID),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }
    mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    return batch if mask.all() else batch | {"attention_mask": mask}


def adapted_in_peft(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    """Return the model with an adapter, prepared as PEFT's documentation does."""
    import peft

    recompute = options.gradient_checkpointing != "off"
    if options.quantization_bit == "4":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=recompute)
    elif recompute:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).train()  # at once: from_pretrained calls eval()


def load_in_transformers(options: argparse.Namespace, placement: Placement) -> nn.Module:
    """Load the base model of the peer, in 4 bits where the options say so."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    how = dict(dtype=placement.dtype, device_map={"": str(placement.device)})
    if options.quantization_bit == "4":
        quant = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        quant |= dict(bnb_4bit_compute_dtype=placement.dtype)
        how |= dict(quantization_config=transformers.BitsAndBytesConfig(**quant))
    return transformers.AutoModelForCausalLM.from_pretrained(options.model, **how)


def peer_optimizer(optim: str) -> type[torch.optim.Optimizer]:
    """Return bitsandbytes' optimizer of the same kind, or PyTorch's for moments in float32."""
    import bitsandbytes

    names = dict(adamw_8bit="AdamW8bit", adamw_bnb_8bit="AdamW8bit", paged_adamw_8bit="PagedAdamW8bit")
    return getattr(bitsandbytes.optim, names[optim]) if optim in names else torch.optim.AdamW
