"""A model that answers: turn by turn in a conversation, or many prompts at once.

Each turn's prompt begins like the one before, and the KV cache already holds the keys and values of that
beginning. So only the new tokens go through the model: the end of the last answer and the next question. The
cache is kept up to the first token that differs, because a template may write an old answer differently from
how the model generated it, and later tokens have attended to the old ones. Copying 2 * layers * G * K numbers
per token costs next to nothing compared with running the layers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch

from minilora.backend.copies import to_device
from minilora.data.chat import ChatTemplate, Message
from minilora.data.stream_decoder import StreamDecoder
from minilora.data.tokenizer import Tokenizer
from minilora.inference.generation import (
    check_sampling,
    end_tokens,
    generate_stream,
    generate_text,
    make_cache,
)
from minilora.lora import set_adapter
from minilora.model import CausalLM, KVCache
from minilora.rope import context_length
from minilora.system.errors import UserError, suggestion


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated; see `minilora.inference.generation.generate_stream`."""

    temperature: float = 0.7  # 0: always the most likely token
    top_p: float = 0.9
    top_k: int = 50  # 0: off
    repetition_penalty: float = 1.0  # 1: off
    max_new_tokens: int = 512
    seed: int = 42

    def __post_init__(self):
        check_sampling(**self.sampling(), max_new_tokens=self.max_new_tokens)
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be at least 0 and below 2^63, not {self.seed}")

    def sampling(self) -> dict[str, float]:
        """The settings that `generate_stream` calls by the same names, except the length limit."""
        return {name: value for name, value in asdict(self).items() if name not in ("max_new_tokens", "seed")}

    def updated(self, name: str, text: str) -> "GenerationSettings":
        """A copy with one setting read from text that a user typed. Raises UserError if it is not valid."""
        if name not in (known := [field.name for field in fields(self)]):
            raise UserError(f"there is no setting {name!r}{suggestion(name, known)}")
        number_type = type(getattr(self, name))
        try:
            value = number_type(text)
        except ValueError as error:
            expected = "whole number" if number_type is int else "number"
            raise UserError(f"{name} must be a {expected}, not {text!r}") from error
        return replace(self, **{name: value})


class Assistant:
    """A model that answers, with the KV cache of the last conversation it read."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,  # None: every message is a prompt on its own
        settings: GenerationSettings,
        adapter: str | None = None,
    ):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.end_ids = end_tokens(model, tokenizer, template and template.end_id)
        self.tokens: list[int] = []  # the tokens that the cache holds, and at most one more
        self.change_settings(settings)
        self.switch_adapter(adapter)

    def change_settings(self, settings: GenerationSettings) -> None:
        """Use other settings from now on, and seed the random numbers again."""
        self.settings = settings
        self.generator = torch.Generator(self.model.model.norm.weight.device).manual_seed(settings.seed)

    def switch_adapter(self, adapter: str | None) -> None:
        """Answer with another adapter, or with none. The cache is dropped: the last adapter computed it."""
        set_adapter(self.model, adapter)
        self.adapter = adapter
        self.cache: KVCache | None = None

    def stream(self, messages: Sequence[Message]) -> Iterator[str]:
        """Yield the answer to a conversation, piece by piece."""
        vocab_size = len(self.model.model.embed_tokens.weight)  # of the adapter, too
        prompt = encode_question(messages, self.tokenizer, self.template, vocab_size)
        limit, decoder = self.answer_limit(prompt), StreamDecoder(self.tokenizer)
        self.cache = reuse_cache(self.model, self.cache, self.tokens, prompt, limit)
        self.tokens = list(prompt)
        input_ids = to_device(torch.tensor([prompt]), self.generator.device)  # (1, T)
        settings = dict(self.settings.sampling(), eos_token_ids=self.end_ids, max_new_tokens=limit)
        settings |= dict(cache=self.cache, generator=self.generator)
        for token in generate_stream(self.model, input_ids, **settings):
            self.tokens.append(int(token))
            if self.tokens[-1] not in self.end_ids:
                yield decoder.feed(self.tokens[-1])
        yield decoder.flush()

    def answer_all(
        self,
        prompts: Sequence[Sequence[int]],
        templates: Iterable[ChatTemplate | None],
        batch_size: int,
        adapter_ids: Sequence[str | None] | None = None,  # of each prompt; None: the assistant's
    ) -> list[str]:
        """The answers to many encoded prompts. The end token of any of the `templates` ends each answer."""
        turn_ends = [template.end_id for template in templates if template is not None]
        ends = end_tokens(self.model, self.tokenizer, *turn_ends)
        how = dict(self.settings.sampling(), eos_token_ids=ends, generator=self.generator)
        how |= dict(adapter_ids=adapter_ids, progress="answers")
        limits = [self.answer_limit(prompt) for prompt in prompts]
        return generate_text(self.model, self.tokenizer, prompts, batch_size, limits, **how)

    def answer_limit(self, prompt: Sequence[int]) -> int:
        """The largest number of tokens that the answer to `prompt` may have."""
        positions = context_length(self.model.config)
        if len(prompt) >= positions:
            raise UserError(
                f"{len(prompt)} tokens fill the {positions} positions of the model; "
                "use a shorter prompt, or /clear the conversation"
            )
        return min(self.settings.max_new_tokens, positions - len(prompt))


def encode_question(
    messages: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate | None, vocab_size: int
) -> list[int]:
    """The token ids of a conversation that waits for an answer; without a template, of its last message.

    Raises UserError for a token that is not in the model's vocabulary.
    """
    ids = tokenizer.encode(messages[-1]["content"]) if template is None else template.encode_prompt(messages)
    if (largest := max(ids, default=0)) >= vocab_size:
        raise UserError(
            f"the tokenizer gives token {largest}, but the model knows {vocab_size}: "
            "they do not belong to the same model"
        )
    return ids


def reuse_cache(
    model: CausalLM, old: KVCache | None, old_tokens: Sequence[int], prompt: Sequence[int], new_tokens: int
) -> KVCache:
    """A cache for `prompt` and `new_tokens` more, filled as far as `prompt` begins like `old_tokens`.

    The last token of the prompt is never taken from the old cache: its logits give the first token of the
    answer, so it must go through the model.
    """
    cache = make_cache(model, 1, len(prompt) + new_tokens)
    if old is not None:
        limit = min(old.length, len(old_tokens), len(prompt) - 1)
        shared = next((t for t in range(limit) if old_tokens[t] != prompt[t]), limit)
        cache.keys[:, :, :, :shared] = old.keys[:, :, :, :shared]
        cache.values[:, :, :, :shared] = old.values[:, :, :, :shared]
        cache.length = shared
    return cache
