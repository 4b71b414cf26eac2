"""How good is a model? Loss and perplexity on held-out examples, and scores of its answers.

    loss         mean over supervised tokens of -log p(token), in nats; perplexity = exp(loss)
    exact match  share of answers that equal the expected one
    ROUGE-L      2 P R / (P + R) of the longest common subsequence of words: P is its share of the answer, R
                 its share of the expected answer. Mean over the answers, 0 to 1.
                 Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3
    BLEU         geometric mean of the precisions of 1 to 4 consecutive words over all answers, times a
                 penalty for answers that are too short. 0 to 100.
                 Papineni et al. 2002, "BLEU: a Method for Automatic Evaluation of Machine Translation",
                 section 2.3

The loss is weighted by tokens, not by batches, so it does not depend on the batch size.

ROUGE and BLEU depend mostly on how text is split into words, and two scores compare only if both split it in
the same way. So the packages that published figures come from compute them. rouge-score knows only words of
the letters a to z and digits; use BLEU for other scripts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from minilora.data.chat import ChatTemplate
from minilora.data.examples import ANSWER_SLACK, Example, Row, batch_for, prompt_ids
from minilora.data.tokenizer import Tokenizer
from minilora.inference.generation import end_tokens, generate_text
from minilora.loss import causal_lm_loss
from minilora.memory.allocator import compiles_kernels
from minilora.mixed import Mixture, adapters, losses_of_each
from minilora.model import CausalLM
from minilora.rope import context_length
from minilora.system.errors import UserError, suggestion
from minilora.system.terminal import progress_bar
from minilora.wrapping import adapter_names

Metric = Callable[[Sequence[str], Sequence[Row]], float]  # a score of answers to rows


def evaluate_loss(
    model: CausalLM,
    examples: Sequence[Example],
    batch_size: int = 8,
    pad_id: int = 0,
    padding_free: bool = True,  # see `batch_for`
    progress: str = "",  # the label of a bar; empty: none is shown
) -> float:
    """The mean loss per supervised token, in nats, computed without dropout."""
    with evaluating(model):
        (loss,) = _mean_losses(
            partial(causal_lm_loss, model), model, examples, batch_size, pad_id, padding_free, progress
        )
    return loss


def evaluate_losses(
    model: CausalLM,
    examples: Sequence[Example],
    adapter_ids: Sequence[str | None],  # whose losses; None: the model alone
    batch_size: int = 8,
    pad_id: int = 0,
    padding_free: bool = True,
    progress: str = "",
) -> dict[str | None, float]:
    """Adapter -> the loss that `evaluate_loss` returns where it is active. All of them read a batch together.

    `batch_size` counts each example once for every adapter, so many adapters need no more memory than one.
    Raises UserError for an adapter that the model does not have.
    """
    if not adapter_names(model) and set(adapter_ids) == {None}:
        return {None: evaluate_loss(model, examples, batch_size, pad_id, padding_free, progress)}
    names, losses = list(dict.fromkeys(adapter_ids)), {}
    for start in range(0, len(names), batch_size):
        group = names[start : start + batch_size]
        with evaluating(model), adapters(model, group) as mixture:
            of_group, at_once = partial(_sums_of, mixture, group), batch_size // len(group)
            found = _mean_losses(of_group, model, examples, at_once, pad_id, padding_free, progress)
        losses |= dict(zip(group, found, strict=True))
    return losses


def _sums_of(mixture: Mixture, names: Sequence[str | None], *batch: Tensor | None) -> Tensor:
    """Return each adapter's loss of a batch, (adapters,)."""
    return torch.stack([*losses_of_each(mixture, names, *batch).values()])


@contextmanager
def evaluating(model: CausalLM) -> Iterator[None]:
    """Compute without dropout and without gradients inside."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _mean_losses(
    losses: Callable[..., Tensor],  # input_ids, labels, document_ids -> sums of a batch, () or (models,)
    model: CausalLM,
    examples: Sequence[Example],
    batch_size: int,
    pad_id: int,
    padding_free: bool,
    progress: str,
) -> list[float]:
    """The means over all supervised tokens."""
    embedding = model.model.embed_tokens.weight
    device, rounded = embedding.device, compiles_kernels(embedding.dtype, embedding.device.type)
    total = torch.zeros((), dtype=torch.float64, device=device)  # read once, after the last batch
    ordered = sorted(examples, key=lambda e: len(e.input_ids))  # similar lengths together: little padding
    with progress_bar(len(ordered), "examples", progress, shown=bool(progress)) as bar:
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            total = total + losses(*batch_for(device, batch, pad_id, rounded, padding_free)).double()
            bar.update(len(batch))
    return (total / sum(e.supervised for e in examples)).flatten().tolist()


def perplexity(model: CausalLM, examples: Sequence[Example], batch_size: int = 8, pad_id: int = 0) -> float:
    """exp of the mean loss per supervised token: 1 for a perfect model, V for a uniform guess."""
    return perplexity_of(evaluate_loss(model, examples, batch_size, pad_id))


def perplexity_of(loss: float) -> float:
    """exp(loss): infinite if that overflows, NaN if the loss is NaN."""
    return math.inf if loss >= 700 else math.exp(loss)


def answers(
    model: CausalLM,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    batch_size: int = 64,
    slack: int = ANSWER_SLACK,
    template: ChatTemplate | None = None,  # formats rows that are conversations
    max_new_tokens: int | None = None,  # of an answer; None: those of the longest expected one, and `slack`
    progress: str = "answers",  # the label of a bar; empty: none is shown
    adapter_ids: Sequence[str | None] | None = None,  # of each row, as in `generate`
) -> list[str]:
    """The greedy answer to each row's prompt.

    `slack` lets the model end the longest answer itself. Prompt and answer keep to the model's positions.
    """
    longest = max(len(tokenizer.encode(row.completion, bos=False)) for row in rows)
    limit, positions = max_new_tokens or longest + slack, context_length(model.config)
    ends = end_tokens(model, tokenizer, template and template.end_id)
    prompts = [prompt_ids(row, tokenizer, template) for row in rows]
    limits = [max(1, min(limit, positions - len(prompt))) for prompt in prompts]
    how = dict(max_new_tokens=limits, eos_token_ids=ends, adapter_ids=adapter_ids, progress=progress)
    with evaluating(model):
        texts = generate_text(model, tokenizer, prompts, batch_size, **how)
    return [text.strip() for text in texts]


def exact_match(texts: Sequence[str], rows: Sequence[Row]) -> float:
    """The share of answers that equal the expected completion, ignoring surrounding whitespace."""
    return sum(text == row.completion.strip() for text, row in zip(texts, rows, strict=True)) / len(rows)


def load_metric(name: str) -> Metric:
    """The metric called `rouge` or `bleu`. Raises UserError for another name and for a missing package."""
    loaders = {"rouge": _load_rouge, "bleu": _load_bleu}
    if name not in loaders:
        raise UserError(f"metric {name!r} is not known{suggestion(name, loaders)}")
    try:
        return loaders[name]()
    except ImportError as error:
        raise UserError(
            f"metric {name} needs the package {error.name}, which is missing: pip install 'minilora[metrics]'"
        ) from error


def _load_rouge() -> Metric:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])

    def rouge(texts: Sequence[str], rows: Sequence[Row]) -> float:
        scores = (scorer.score(row.completion, text) for text, row in zip(texts, rows, strict=True))
        return sum(score["rougeL"].fmeasure for score in scores) / len(rows)

    return rouge


def _load_bleu() -> Metric:
    from sacrebleu import corpus_bleu

    def bleu(texts: Sequence[str], rows: Sequence[Row]) -> float:
        return corpus_bleu(texts, [[row.completion.strip() for row in rows]]).score

    return bleu
