"""A model that answers: in a conversation, piece by piece, and to many questions at once.

Every turn of a conversation is a longer prompt that begins like the one before. Its keys and values are in
the KV cache still, so only what is new goes through the model: the end of the last answer and the question.
Where the two prompts part, they part for good: a template may word an old answer differently from how it was
made, and tokens behind that place saw other tokens. With 2 * layers * G * K numbers a token the copy is
nothing beside the layers that it saves.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch

from minilora.data.chat import ChatTemplate, Message
from minilora.data.stream_decoder import StreamDecoder
from minilora.data.tokenizer import Tokenizer
from minilora.inference.generation import check_sampling, end_tokens, generate_stream, generate_text
from minilora.lora import set_adapter
from minilora.model import CausalLM, KVCache
from minilora.system.errors import UserError, suggestion


@dataclass(frozen=True)
class Settings:
    """How answers are drawn; see `minilora.inference.generation.generate_stream`."""

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

    def changed(self, name: str, text: str) -> "Settings":
        """With one of them as a person typed it."""
        if name not in (known := [field.name for field in fields(self)]):
            raise UserError(f"there is no setting {name!r}{suggestion(name, known)}")
        kind = type(getattr(self, name))
        try:
            return replace(self, **{name: kind(text)})
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{name} must be a {'whole number' if kind is int else 'number'}, not {text!r}"
            ) from error

    def sampling(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if name not in ("max_new_tokens", "seed")}


class Assistant:
    """A model that answers, and what it keeps in mind: the keys and values of all tokens that it has seen
    last.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,  # None: every message is a prompt of its own
        settings: Settings,
        adapter: str | None = None,
    ):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.ends = end_tokens(model, tokenizer, template and template.end_id)
        self.tokens: list[int] = []  # what the cache was made from, and at most one token more
        self.change(settings)
        self.switch(adapter)

    def change(self, settings: Settings) -> None:
        """Other settings; the random numbers begin anew."""
        self.settings = settings
        self.generator = torch.Generator(self.model.model.norm.weight.device).manual_seed(settings.seed)

    def switch(self, adapter: str | None) -> None:
        """Answer with another adapter, or with none. Nothing of what the last one made of the conversation is
        kept.
        """
        set_adapter(self.model, adapter)
        self.adapter = adapter
        self.cache: KVCache | None = None

    def room(self, prompt: Sequence[int]) -> int:
        """How many tokens an answer may have."""
        positions = self.model.config.max_position_embeddings
        if len(prompt) >= positions:
            raise UserError(
                f"{len(prompt)} tokens fill the {positions} positions of the model; say less, or /clear"
            )
        return min(self.settings.max_new_tokens, positions - len(prompt))

    def stream(self, messages: Sequence[Message]) -> Iterator[str]:
        """The answer, piece by piece."""
        prompt = prompt_ids(messages, self.tokenizer, self.template, self.model.config.vocab_size)
        room, decoder = self.room(prompt), StreamDecoder(self.tokenizer)
        self.cache = carry_over(self.model, self.cache, self.tokens, prompt, room)
        self.tokens = list(prompt)
        input_ids = torch.tensor([prompt], device=self.generator.device)  # (1, T)
        drawn = dict(self.settings.sampling(), eos_token_ids=self.ends, generator=self.generator)
        for token in generate_stream(self.model, input_ids, max_new_tokens=room, cache=self.cache, **drawn):
            self.tokens.append(int(token))
            if self.tokens[-1] not in self.ends:
                yield decoder.feed(self.tokens[-1])
        yield decoder.flush()

    def answer_all(
        self,
        prompts: Sequence[Sequence[int]],
        templates: Iterable[
            ChatTemplate | None
        ],  # that worded them; what ends an answer of one of them ends all answers
        batch_size: int,
    ) -> list[str]:
        """Answers to many at once."""
        ends = end_tokens(
            self.model, self.tokenizer, *(template and template.end_id for template in templates)
        )
        drawn = dict(self.settings.sampling(), eos_token_ids=ends, generator=self.generator)
        room = [self.room(prompt) for prompt in prompts]
        return generate_text(self.model, self.tokenizer, prompts, batch_size, max_new_tokens=room, **drawn)


def prompt_ids(
    messages: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate | None, vocab_size: int
) -> list[int]:
    """A conversation as tokens; without a template its last message alone. Raises UserError for tokens that
    no model of V knows.
    """
    ids = tokenizer.encode(messages[-1]["content"]) if template is None else template.encode_prompt(messages)
    if (largest := max(ids, default=0)) >= vocab_size:
        raise UserError(
            f"the tokenizer gives token {largest}, the model knows {vocab_size}: they are not of one model"
        )
    return ids


def carry_over(
    model: CausalLM, held: KVCache | None, tokens: Sequence[int], prompt: Sequence[int], room: int
) -> KVCache:
    """A cache for one prompt and `room` more tokens, that begins with what `held` holds of it: `tokens` are
    those that made it.

    The last token of the prompt is always left to go through the model: its logits are what the answer begins
    with.
    """
    weight = model.model.norm.weight
    cache = KVCache(model.config, 1, len(prompt) + room, weight.dtype, weight.device)
    if held is not None:
        both = min(held.length, len(prompt) - 1)
        shared = next((i for i in range(both) if tokens[i] != prompt[i]), both)
        cache.keys[:, :, :, :shared] = held.keys[:, :, :, :shared]
        cache.values[:, :, :, :shared] = held.values[:, :, :, :shared]
        cache.length = shared
    return cache
