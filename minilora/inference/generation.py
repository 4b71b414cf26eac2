"""Turn logits into text, one token at a time.

The prompt goes through the model once and fills the KV cache; after that, every new token costs one pass over
a single position. A conversation's cache already holds the beginning of the prompt, which saves that part of
the first pass too. Prompts of different lengths are padded on the left, so that all of them end at the same
position. The padding is a document of its own (see `minilora.model`), so every row gets exactly the numbers
that it would get alone. Rows may have adapters of their own, too (see `minilora.mixed`).

Sampling is a chain of small changes to the logits, in the order that transformers applies them: repetition
penalty, temperature, top-k, top-p, then a random draw. Temperature 0 means greedy: always the most likely
token.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minilora.backend.copies import to_device
from minilora.backend.documents import PADDING
from minilora.data.tokenizer import Tokenizer
from minilora.inference.token_graph import token_graph
from minilora.mixed import adapters
from minilora.model import CausalLM, KVCache
from minilora.system.errors import UserError
from minilora.system.terminal import progress_bar

# Logits are in the tens. Divided by a smaller number than this they lie so far apart that one token has all
# the probability, and nothing is left to draw. Much smaller divisors overflow float32, and infinite logits
# have no probabilities.
LEAST_DIVISOR = 1e-6
READ_TOGETHER = 8  # tokens that a GPU computes while the host waits for none of them


def generate(
    model: CausalLM,
    input_ids: Tensor,  # (Bt, T)
    attention_mask: Tensor | None = None,  # (Bt, T): 0 on the padding, which is on the left
    adapter_ids: Sequence[str | None] | None = None,  # of each row; None: the model alone
    **settings,  # max_new_tokens, eos_token_ids, temperature, ...: see `generate_stream`
) -> Tensor:
    """Continue each row: (Bt, T) -> (Bt, T + new), new <= max_new_tokens; rows that end early are padded.

    Without `adapter_ids` all rows have the active adapter. Raises UserError for one that the model has not.
    """
    check_adapter_ids(adapter_ids, len(input_ids), "rows")
    with nullcontext() if adapter_ids is None else adapters(model, adapter_ids):
        new = torch.stack(list(generate_stream(model, input_ids, attention_mask, **settings)), dim=1)
    return torch.cat([input_ids, new.to(input_ids.device)], dim=1)


@torch.no_grad()
def generate_stream(
    model: CausalLM,
    input_ids: Tensor,  # (Bt, T)
    attention_mask: Tensor | None = None,  # (Bt, T): 0 on the padding, which is on the left; best on the CPU
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,  # 0: greedy; below 1 sharper, above 1 flatter
    top_k: int = 0,  # draw among the k most likely tokens; 0: all
    top_p: float = 1.0,  # draw among the most likely tokens that together have this probability
    repetition_penalty: float = 1.0,  # above 1: tokens already in the row become less likely
    eos_token_ids: Sequence[int] | None = None,  # None: the model's own; (): never stop early
    pad_token_id: int = 0,  # fills a row that has ended
    use_cache: bool = True,
    cache: KVCache | None = None,  # holds the first tokens of unpadded input_ids; has room for all new ones
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield one new token for each row, (Bt,), until every row has ended or `max_new_tokens` are reached.

    They lie on the CPU. Tokens of a GPU come in groups, see `read_in_groups`. Wherever the stream ends, the
    cache and the generator are as if no token had been computed beyond the last one that was yielded.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty)
    (Bt, T), device = input_ids.shape, input_ids.device
    if use_cache and cache is None:
        cache = make_cache(model, Bt, T + max_new_tokens)
    cache = cache if use_cache else None
    choose = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    prompt = input_ids, attention_mask
    tokens = compute_tokens(model, *prompt, max_new_tokens, repetition_penalty, cache, choose)
    eos = model.config.eos_token_ids if eos_token_ids is None else eos_token_ids
    count, random_state = 0, None
    try:
        for told, state in until_ended(read_in_groups(tokens, device, generator), eos, pad_token_id):
            count, random_state = count + 1, state
            yield told
    finally:
        if random_state is not None:
            generator.set_state(random_state)
        if cache is not None:  # the model has not read the last token
            cache.length = min(cache.length, T + max(count - 1, 0))


def make_cache(model: CausalLM, batch_size: int, max_length: int) -> KVCache:
    """Return an empty cache in the dtype of the activations: the embedding table's, whatever is trained."""
    table = next(model.parameters())
    return KVCache(model.config, batch_size, max_length, table.dtype, table.device)


def compute_tokens(
    model: CausalLM,
    input_ids: Tensor,  # (Bt, T)
    attention_mask: Tensor | None,  # (Bt, T)
    max_new_tokens: int,
    repetition_penalty: float,
    cache: KVCache | None,
    choose: Callable[[Tensor], Tensor],  # logits (Bt, V) -> tokens (Bt,)
) -> Iterator[Tensor]:
    """Yield one new token for each row, (Bt,), on the model's device, without waiting for it.

    A row that has ended goes on: what it says there is cut off on the host.
    """
    T, device = input_ids.shape[1], input_ids.device

    def extended(rows: Tensor | None, value: int) -> Tensor | None:  # (Bt, T) -> (Bt, T + max_new_tokens)
        return None if rows is None else to_device(F.pad(rows, (0, max_new_tokens), value=value), device)

    def part(rows: Tensor | None, first: int, end: int) -> Tensor | None:
        return None if rows is None else rows[:, first:end]

    documents = extended(padding_documents(attention_mask), 0)
    is_text, sequence = extended(attention_mask, 1), extended(input_ids, 0)
    graph = token_graph(model, cache, max_new_tokens)
    for end in range(T, T + max_new_tokens):
        first = 0 if cache is None else cache.length
        unread = sequence[:, first:end], part(documents, first, end)
        if graph and end - first == 1:
            logits = graph.read(*unread)  # (Bt, V)
        else:
            hidden = model.model(unread[0], document_ids=unread[1], cache=cache)  # (Bt, unread, D)
            logits = model.lm_head(hidden[:, -1:]).float().squeeze(1)
        if repetition_penalty != 1.0:
            logits = penalize_repetition(logits, sequence[:, :end], repetition_penalty, part(is_text, 0, end))
        sequence[:, end] = choose(logits)
        yield sequence[:, end]


def read_in_groups(
    tokens: Iterator[Tensor], device: torch.device, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield tokens on the CPU, each with the random state behind it, or None where that is the present one.

    Whenever the host reads from a GPU, the GPU runs out of work. So the host reads the first token at once,
    for whoever waits for it, and then some together. Up to all but one of a group may be computed in vain, if
    the first of them ends the text. On a CPU there is nothing to wait for, and each token comes at once.
    """
    size, later = 1, READ_TOGETHER if device.type == "cuda" else 1
    noted = ((token, generator.get_state() if generator and later > 1 else None) for token in tokens)
    while group := list(islice(noted, size)):
        read = torch.stack([token for token, _ in group]).cpu()  # (tokens, Bt)
        yield from zip(read, [state for _, state in group], strict=True)
        size = later


def until_ended(
    tokens: Iterator[tuple[Tensor, Tensor | None]], eos_token_ids: Sequence[int], pad_token_id: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield tokens, (Bt,) each, and what came with them, until every row has ended; ended rows are padded."""
    eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device="cpu")
    ended = torch.zeros((), dtype=torch.bool, device="cpu")  # (Bt,) from the first token on
    for token, state in tokens:
        token = token.masked_fill(ended, pad_token_id)
        ended = ended | torch.isin(token, eos)
        yield token, state
        if ended.all():
            return


def padding_documents(attention_mask: Tensor | None) -> Tensor | None:
    """Document ids that separate padding from text: (Bt, T) -> (Bt, T), or None if there is no padding."""
    if attention_mask is None or attention_mask.all():
        return None
    if (attention_mask[:, 1:] < attention_mask[:, :-1]).any():
        raise ValueError("attention_mask has zeros after ones; generation needs the padding on the left")
    return torch.where(attention_mask.bool(), 0, PADDING)


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None = None
) -> Tensor:
    """Draw one token from each row: (Bt, V) -> (Bt,). See `generate_stream` for the arguments."""
    if temperature == 0:
        return logits.argmax(-1)
    likely = probabilities(logits, temperature, top_k, top_p)
    return draw(likely, torch.empty_like(likely).exponential_(generator=generator))


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Return how likely each token is to be drawn: (Bt, V) -> (Bt, V). The temperature is above 0."""
    return keep_top_p(keep_top_k(logits / temperature, top_k), top_p).softmax(-1)


def draw(likely: Tensor, u: Tensor) -> Tensor:
    """Draw one token from each row of probabilities: (Bt, V) -> (Bt,), with u ~ Exp(1), (Bt, V).

    torch.multinomial's draw, without its checks, for which the host would wait twice: p / u is largest at
    token i with probability p_i.
    """
    return (likely / u).argmax(-1)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the k largest logits of each row to -inf: (Bt, V) -> (Bt, V). k = 0 keeps all of them.

    Logits equal to the k-th largest are kept too.
    """
    if k == 0 or k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of tokens whose probability is at least p, the nucleus: (Bt, V) -> (Bt, V).

    Holtzman et al. 2019, arXiv:1904.09751, section 3.1.
    """
    if p >= 1.0:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)  # (Bt, V)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability  # the probability of all tokens that are more likely
    dropped = (before >= p).scatter(-1, order, before >= p)
    return logits.masked_fill(dropped, float("-inf"))


def penalize_repetition(
    logits: Tensor, sequence: Tensor, penalty: float, attention_mask: Tensor | None = None
) -> Tensor:
    """Make the tokens of each row less likely: logits (Bt, V), sequence (Bt, T) -> (Bt, V).

    Their positive logits are divided by `penalty`, their negative ones multiplied by it. Padding does not
    count. Keskar et al. 2019, arXiv:1909.05858, section 4.1.
    """
    present = torch.zeros_like(logits, dtype=torch.long)
    weight = torch.ones_like(sequence) if attention_mask is None else attention_mask.to(sequence.dtype)
    return penalize(logits, present.scatter_add(1, sequence, weight).bool(), penalty)


def penalize(logits: Tensor, present: Tensor, penalty: float) -> Tensor:
    """Make the tokens that are present less likely: logits and bool, (Bt, V) each -> (Bt, V)."""
    return torch.where(present, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def end_tokens(model: CausalLM, tokenizer: Tokenizer, *turn_ends: int | None) -> set[int]:
    """The tokens that end an answer: the model's EOS, the tokenizer's, and the chat templates' `turn_ends`.

    Training puts the tokenizer's EOS behind every completion.
    """
    return {*model.config.eos_token_ids, tokenizer.eos_id, *turn_ends} - {None}


def generate_text(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],  # texts or token ids
    batch_size: int = 32,
    max_new_tokens: int | Sequence[int] = 128,  # one limit for all prompts, or a limit for each
    progress: str = "",  # the label of a bar; empty: none is shown
    adapter_ids: Sequence[str | None] | None = None,  # of each prompt, as in `generate`
    **settings,  # as in `generate_stream`
) -> list[str]:
    """The completion of every prompt, without the prompt, cut before the first end token.

    Prompts of different adapters are answered in one batch.
    """
    check_adapter_ids(adapter_ids, len(prompts), "prompts")
    device = model.model.embed_tokens.weight.device
    rows = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    limits = [max_new_tokens] * len(rows) if isinstance(max_new_tokens, int) else max_new_tokens
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # similar lengths together: little padding
    eos = set(settings.setdefault("eos_token_ids", end_tokens(model, tokenizer)))
    texts = [""] * len(rows)
    with progress_bar(len(rows), "answers", progress, shown=bool(progress)) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            input_ids, attention_mask = pad_left([rows[i] for i in batch], tokenizer.pad_id)
            input_ids = to_device(input_ids, device)
            settings |= dict(pad_token_id=tokenizer.pad_id, max_new_tokens=max(limits[i] for i in batch))
            of_rows = adapter_ids and [adapter_ids[i] for i in batch]
            with adapters(model, of_rows) if of_rows else nullcontext():
                stream = generate_stream(model, input_ids, attention_mask, **settings)
                new_tokens = torch.stack(list(_counted(stream, bar, len(batch))), dim=1)  # (Bt, new)
            for i, new in zip(batch, new_tokens.tolist(), strict=True):
                end = next((t for t, token in enumerate(new[: limits[i]]) if token in eos), limits[i])
                texts[i] = tokenizer.decode(new[:end])
            bar.update(len(batch))
    return texts


def _counted(stream: Iterator[Tensor], bar: tqdm, answers: int) -> Iterator[Tensor]:
    """Yield the same tokens, and count them beside the bar: a batch of long answers may take minutes."""
    for number, token in enumerate(stream, start=1):
        bar.set_postfix_str(f"token {number} of the next {answers}", refresh=False)
        bar.update(0)
        yield token


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as ids (Bt, T), and a mask (Bt, T) that is 0 on the padding; on the CPU."""
    T = max(len(row) for row in rows)
    input_ids = torch.tensor([[pad_id] * (T - len(row)) + list(row) for row in rows])
    attention_mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])
    return input_ids, attention_mask


def check_adapter_ids(adapter_ids: Sequence[str | None] | None, count: int, of: str) -> None:
    """Raise UserError unless there is an adapter, or None, for each."""
    if adapter_ids is not None and len(adapter_ids) != count:
        raise UserError(f"adapter_ids names {len(adapter_ids)} adapters for {count} {of}")


def check_sampling(
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, repetition_penalty: float
) -> None:
    """Raise UserError for a setting that `generate_stream` cannot use."""
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
