"""minilora: LoRA and QLoRA from scratch."""

from minilora.config import PRESETS, LoraConfig, ModelConfig, QuantConfig
from minilora.data.tokenizer import load_tokenizer
from minilora.formats.adapter import load_adapter, save_adapter
from minilora.formats.weights import load_model, save_model
from minilora.inference.evaluation import perplexity
from minilora.inference.generation import generate
from minilora.lora import add_lora, merge_lora, remove_lora, set_adapter, trainable_parameters, unmerge_lora
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
