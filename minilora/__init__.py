"""minilora: LoRA and QLoRA from scratch."""

from minilora.adapter import load_adapter, save_adapter
from minilora.config import PRESETS, LoraConfig, ModelConfig, QuantConfig
from minilora.errors import UserError
from minilora.evaluation import perplexity
from minilora.generation import generate
from minilora.lora import add_lora, merge_lora, remove_lora, set_adapter, trainable_parameters, unmerge_lora
from minilora.model import CausalLM, KVCache
from minilora.quantization import QuantizedTensor, dequantize_4bit, quantize_4bit
from minilora.tokenizer import load_tokenizer
from minilora.weights import load_model, save_model

__all__ = [
    "PRESETS",
    "CausalLM",
    "KVCache",
    "LoraConfig",
    "ModelConfig",
    "QuantConfig",
    "QuantizedTensor",
    "UserError",
    "add_lora",
    "dequantize_4bit",
    "generate",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "merge_lora",
    "perplexity",
    "quantize_4bit",
    "remove_lora",
    "save_adapter",
    "save_model",
    "set_adapter",
    "trainable_parameters",
    "unmerge_lora",
]
