"""minilora: LoRA and QLoRA from scratch."""

from minilora.adapter import load_adapter, save_adapter
from minilora.config import PRESETS, LoraConfig, ModelConfig
from minilora.errors import UserError
from minilora.evaluation import perplexity
from minilora.generation import generate
from minilora.lora import add_lora, merge_lora, remove_lora, set_adapter, trainable_parameters, unmerge_lora
from minilora.model import CausalLM, KVCache
from minilora.tokenizer import load_tokenizer
from minilora.weights import load_model, save_model

__all__ = [
    "PRESETS",
    "CausalLM",
    "KVCache",
    "LoraConfig",
    "ModelConfig",
    "UserError",
    "add_lora",
    "generate",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "merge_lora",
    "perplexity",
    "remove_lora",
    "save_adapter",
    "save_model",
    "set_adapter",
    "trainable_parameters",
    "unmerge_lora",
]
