"""Turning logits into text, one token at a time.

The prompt goes through the model once and fills the KV cache; after that every new token costs one pass over
one place. A cache that holds the beginning of the prompt already, as a conversation has it, saves that part
as well. Prompts of different lengths are padded on the left, so that all of them end at the same place, and
the padding is a document of its own (see `minilora.model`): every row gets exactly the numbers it would get
alone.

Sampling is a chain of small changes to the logits, in the order that transformers applies them: repetition
penalty, temperature, top-k, top-p, then a draw. Temperature 0 means greedy: the most likely token, always.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minilora.data.tokenizer import Tokenizer
from minilora.model import PADDING, CausalLM, KVCache
from minilora.system.errors import UserError

# Logits are tens, and divided by less than this they are so far apart that one token has all the probability:
# nothing is left to draw. Divided by much less they leave float32, and what is infinite has no probabilities
# at all.
LEAST_DIVISOR = 1e-6


def generate(
    model: CausalLM,
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor | None = None,  # (B, T): 0 where a row is padded, on the left
    *,
    max_new_tokens: int = 128,
    eos_token_ids: Sequence[int] | None = None,  # None: the model's own; (): never stop early
    pad_token_id: int = 0,
    use_cache: bool = True,
    **sampling,  # temperature, top_k, top_p, repetition_penalty, generator: see `generate_stream`
) -> Tensor:
    """Continue each row: (B, T) -> (B, T + new), new <= max_new_tokens. A row that has ended is filled with
    `pad_token_id`.
    """
    steps = generate_stream(
        model,
        input_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
        use_cache=use_cache,
        **sampling,
    )
    return torch.cat([input_ids, *(token.unsqueeze(1) for token in steps)], dim=1)


@torch.no_grad()
def generate_stream(
    model: CausalLM,
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor | None = None,  # (B, T)
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,  # 0: greedy; below 1 sharper, above 1 flatter
    top_k: int = 0,  # draw among the k most likely; 0: all
    top_p: float = 1.0,  # draw among the most likely that together have this probability
    repetition_penalty: float = 1.0,  # above 1: tokens already in the row become less likely
    eos_token_ids: Sequence[int] | None = None,
    pad_token_id: int = 0,
    use_cache: bool = True,
    cache: KVCache
    | None = None,  # holds the first tokens of input_ids, without padding, and has room for all that come
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The new tokens as they come, (B,) a step. Ends when every row has ended or after `max_new_tokens`."""
    check_sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty)
    (B, T), device = input_ids.shape, input_ids.device
    eos = model.config.eos_token_ids if eos_token_ids is None else eos_token_ids
    eos = torch.tensor(list(eos), dtype=torch.long, device=device)
    documents = None
    if attention_mask is not None and not attention_mask.all():
        if (attention_mask[:, 1:] < attention_mask[:, :-1]).any():
            raise ValueError("attention_mask has zeros after ones; generation wants the padding on the left")
        documents = torch.where(attention_mask.bool(), 0, PADDING)  # (B, T)
    if use_cache and cache is None:
        cache = KVCache(model.config, B, T + max_new_tokens, model.model.norm.weight.dtype, device)
    sequence, new = (
        input_ids,
        input_ids[:, cache.length if use_cache else 0 :],
    )  # the whole row so far, and what is new to the model
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        hidden = model.model(new, document_ids=documents, cache=cache)  # (B, new, D)
        logits = model.lm_head(hidden[:, -1]).float()  # (B, V)
        if repetition_penalty != 1.0:
            logits = penalize_repetition(logits, sequence, repetition_penalty, attention_mask)
        token = sample(logits, temperature, top_k, top_p, generator).masked_fill(ended, pad_token_id)  # (B,)
        ended = ended | torch.isin(token, eos)
        yield token
        if ended.all():
            return
        sequence = torch.cat((sequence, token.unsqueeze(1)), dim=1)
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask, torch.ones_like(attention_mask[:, :1])), dim=1)
        new = token.unsqueeze(1) if use_cache else sequence
        if documents is not None:
            last = torch.zeros_like(documents[:, :1])
            documents = last if use_cache else torch.cat((documents, last), dim=1)


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None = None
) -> Tensor:
    """Draw one token from each row: (B, V) -> (B,). See `generate_stream` for the arguments."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = keep_top_p(keep_top_k(logits / temperature, top_k), top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k largest of each row (and what ties with the k-th) set to -inf. k = 0 keeps all. (B, V) ->
    (B, V).
    """
    if k == 0 or k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2019, arXiv:1904.09751, section 3.1): the smallest set of tokens with
    probability >= p.
    """
    if p >= 1.0:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)  # (B, V)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability  # of all tokens that are more likely
    dropped = (before >= p).scatter(-1, order, before >= p)
    return logits.masked_fill(dropped, float("-inf"))


def penalize_repetition(
    logits: Tensor, sequence: Tensor, penalty: float, attention_mask: Tensor | None = None
) -> Tensor:
    """Divide positive logits of tokens in the row by `penalty`, multiply negative ones (Keskar et al. 2019,
    arXiv:1909.05858, 4.1).

    logits: (B, V), sequence: (B, T) -> (B, V). Padding does not count as said.
    """
    said = torch.zeros_like(logits, dtype=torch.long)
    weight = torch.ones_like(sequence) if attention_mask is None else attention_mask.to(sequence.dtype)
    said = said.scatter_add(1, sequence, weight).bool()  # (B, V)
    return torch.where(said, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def end_tokens(model: CausalLM, tokenizer: Tokenizer, *more: int | None) -> set[int]:
    """What ends an answer: the model's own EOS, the one that training put behind every completion, and, of a
    chat, a turn's end.
    """
    return {*model.config.eos_token_ids, tokenizer.eos_id, *more} - {None}


def generate_text(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],  # as text, or encoded
    batch_size: int = 32,
    max_new_tokens: int | Sequence[int] = 128,  # one for all, or each prompt's own
    **settings,
) -> list[str]:
    """The completion of every prompt, without the prompt and without what follows its EOS. `settings` as in
    `generate_stream`.
    """
    device = model.model.embed_tokens.weight.device
    rows = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    room = [max_new_tokens] * len(rows) if isinstance(max_new_tokens, int) else max_new_tokens
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # neighbours of like length: little padding
    eos = set(settings.setdefault("eos_token_ids", end_tokens(model, tokenizer)))
    texts = [""] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        input_ids, attention_mask = pad_left([rows[i] for i in chosen], tokenizer.pad_id, device)
        settings |= dict(pad_token_id=tokenizer.pad_id, max_new_tokens=max(room[i] for i in chosen))
        output = generate(model, input_ids, attention_mask, **settings)
        for i, row in zip(chosen, output[:, input_ids.shape[1] :].tolist(), strict=True):
            end = next((place for place, token in enumerate(row[: room[i]]) if token in eos), room[i])
            texts[i] = tokenizer.decode(row[:end])
    return texts


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as (B, T) ids and the (B, T) mask that is 0 on the padding."""
    T = max(len(row) for row in rows)
    input_ids = torch.tensor([[pad_id] * (T - len(row)) + list(row) for row in rows], device=device)
    attention_mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows], device=device)
    return input_ids, attention_mask


def check_sampling(
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, repetition_penalty: float
) -> None:
    """Raises UserError for a setting that `generate_stream` cannot work with."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not (temperature == 0 or LEAST_DIVISOR <= temperature < math.inf):
        raise UserError(
            f"temperature must be 0 (the most likely token) or at least {LEAST_DIVISOR:g}, not {temperature}"
        )
    if top_k < 0:
        raise UserError(f"top_k must be at least 0 (0: off), not {top_k}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, not {top_p}")
    if not LEAST_DIVISOR <= repetition_penalty <= 1 / LEAST_DIVISOR:
        bounds = f"at least {LEAST_DIVISOR:g} and at most {1 / LEAST_DIVISOR:g}"
        raise UserError(f"repetition_penalty must be {bounds} (1: off), not {repetition_penalty}")
