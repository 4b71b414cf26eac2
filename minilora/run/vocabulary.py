"""New tokens of a run: a tokenizer that holds them, rows for them in the model, and which rows are trained.

    ids       the tokenizer's files with the new tokens lie in a temporary directory until the run has one
    rows      the embedding and the head grow only if the ids need it: many models have rows to spare, Qwen
              151,936 for 151,669 tokens. Then to a multiple of 64, as in LLaMA-Factory and vLLM: GPUs are
              fastest at matrices of such sizes, and several GPUs can share one evenly
    trained   by default the new tokens' rows alone, in the embedding and in a head of its own: thousands of
              numbers. `additional_target: embed_tokens,lm_head` trains both whole, with all tokens' rows

A token that the tokenizer has already is trained like a new one: base models hold many that they never saw.
Spare rows begin as they are in the model's files, added ones at the mean (`new_rows.grow_vocabulary`).
"""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from minilora.config import LoraConfig, ModelConfig
from minilora.data.new_tokens import add_new_tokens
from minilora.data.tokenizer import Tokenizer, load_tokenizer
from minilora.formats.weights import load_model
from minilora.model import CausalLM
from minilora.new_rows import grow_vocabulary
from minilora.parallel.loading import load_sharded
from minilora.run.settings import TrainConfig
from minilora.system.device import Placement
from minilora.system.distributed import Processes
from minilora.system.errors import UserError, summarize, until_end
from minilora.system.schema import shown
from minilora.targets import EMBEDDING, OUTPUT_HEAD, matching_names, saved_modules

MULTIPLE = 64


def load_run_tokenizer(config: TrainConfig, directory: Path) -> Tokenizer:
    """Return the tokenizer in a directory, with the run's new tokens. Nothing is written beside it."""
    tokenizer, (plain, special) = load_tokenizer(directory), config.new_tokens()
    if not plain and not special:
        return tokenizer
    temporary = Path(tempfile.mkdtemp(prefix="minilora-tokenizer-"))
    until_end.callback(shutil.rmtree, temporary, ignore_errors=True)
    extended = add_new_tokens(tokenizer, plain, special, temporary)
    old = [token for token in (*plain, *special) if tokenizer.token_id(token) is not None]
    new = [token for token in (*plain, *special) if token not in old]
    named = [f"{shown(token)} {extended.token_id(token)}" for token in new]
    in_words = f"{len(new)} new: {summarize(named, 5)}" if new else "none is new"
    there = f"; there already, and only trained: {summarize([*map(shown, old)], 5)}" if old else ""
    print(f"tokens     {in_words}{there}")
    return extended


def load_base_model(
    directory: Path,
    config: TrainConfig,
    placement: Placement,
    model_config: ModelConfig,
    sharers: Processes | None = None,
) -> CausalLM:
    """Return the frozen model as the settings store it, with `model_config`'s rows of embedding, or more.

    sharers: the processes that keep a part of it each. None: it is whole.
    """
    where, accepted = (placement.dtype, placement.device), config.accepted_fields()
    if sharers is not None:
        return load_sharded(directory, config.quant_config(), *where, sharers, accepted, config.fsdp_offload)
    model = load_model(directory, config.quant_config(), *where, accept_config_fields=accepted)
    grow_vocabulary(model, model_config.vocab_size, config.seed)
    return model


def choose_vocabulary(
    config: TrainConfig, lora: LoraConfig, model_config: ModelConfig, tokenizer: Tokenizer
) -> tuple[LoraConfig, ModelConfig]:
    """Return the adapter with the rows that it trains, and the model with enough rows for all tokens."""
    tokens, size = {*sum(config.new_tokens(), ())}, model_config.vocab_size
    if not tokens and not config.resize_vocab:
        return lora, model_config
    rows = {tokenizer.token_id(token) for token in tokens} | {*range(size, tokenizer.vocab_size)}
    if tokenizer.vocab_size > size:
        size = -(-tokenizer.vocab_size // MULTIPLE) * MULTIPLE
    return train_rows(lora, sorted(rows), model_config), replace(model_config, vocab_size=size)


def train_rows(lora: LoraConfig, rows: list[int], model_config: ModelConfig) -> LoraConfig:
    """Let an adapter train these rows, in the embedding and the head, where it does not train all of them."""
    both = (EMBEDDING, OUTPUT_HEAD)
    whole = saved_modules(both, lora.modules_to_save)
    parts = [path.rpartition(".")[2] for path in both if path not in whole]
    if not rows or not parts:
        return lora
    if not isinstance(lora.target_modules, str) and matching_names(both, lora.target_modules):
        raise UserError(
            "lora_target names the embedding or the head, whose rows new tokens train: leave it out there, "
            "or set additional_target to embed_tokens,lm_head"
        )
    if model_config.tie_word_embeddings and not whole:
        return replace(lora, trainable_token_indices=tuple(rows))  # the head shares them
    return replace(lora, trainable_token_indices={part: list(rows) for part in parts})
