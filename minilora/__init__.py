"""minilora: LoRA and QLoRA from scratch.

Each public name is imported when it is first asked for. So `import minilora` takes no time, and a script can
prepare itself for Ctrl-C before it waits for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minilora.adapters.save_load import load_adapter, save_adapter
    from minilora.config import PRESETS, LoraConfig, ModelConfig, QuantConfig
    from minilora.data.tokenizer import load_tokenizer
    from minilora.formats.weights import load_model, save_model
    from minilora.inference.evaluation import perplexity
    from minilora.inference.generation import generate
    from minilora.lora import (
        add_lora,
        merge_lora,
        remove_lora,
        set_adapter,
        trainable_parameters,
        unmerge_lora,
    )
    from minilora.loss import linear_cross_entropy
    from minilora.memory.ledger import memory_ledger
    from minilora.model import CausalLM, KVCache
    from minilora.optim import AdamW8bit
    from minilora.quantization import QuantizedTensor, dequantize_4bit, quantize_4bit
    from minilora.recompute import checkpoint, set_recompute
    from minilora.system.errors import UserError

__all__ = [
    "PRESETS",
    "AdamW8bit",
    "CausalLM",
    "KVCache",
    "LoraConfig",
    "ModelConfig",
    "QuantConfig",
    "QuantizedTensor",
    "UserError",
    "add_lora",
    "checkpoint",
    "dequantize_4bit",
    "generate",
    "linear_cross_entropy",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "memory_ledger",
    "merge_lora",
    "perplexity",
    "quantize_4bit",
    "remove_lora",
    "save_adapter",
    "save_model",
    "set_adapter",
    "set_recompute",
    "trainable_parameters",
    "unmerge_lora",
]

_MODULES = {  # module -> its public names
    "config": "PRESETS LoraConfig ModelConfig QuantConfig",
    "data.tokenizer": "load_tokenizer",
    "adapters.save_load": "load_adapter save_adapter",
    "formats.weights": "load_model save_model",
    "inference.evaluation": "perplexity",
    "inference.generation": "generate",
    "lora": "add_lora merge_lora remove_lora set_adapter trainable_parameters unmerge_lora",
    "loss": "linear_cross_entropy",
    "memory.ledger": "memory_ledger",
    "model": "CausalLM KVCache",
    "optim": "AdamW8bit",
    "quantization": "QuantizedTensor dequantize_4bit quantize_4bit",
    "recompute": "checkpoint set_recompute",
    "system.errors": "UserError",
}


def __getattr__(name: str) -> object:
    """Import a public name from its module (PEP 562)."""
    for module, names in _MODULES.items():
        if name in names.split():
            globals()[name] = getattr(import_module(f"minilora.{module}"), name)
            return globals()[name]
    raise AttributeError(f"module 'minilora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
