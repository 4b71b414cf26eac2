"""How good is it: loss and perplexity on held-out examples, exact answers, and answers that share words with
the expected ones.

    loss         mean over supervised tokens of -log p(token), in nats; perplexity = exp(loss)
    exact match  share of answers that are the expected one
    ROUGE-L      2 P R / (P + R) of the longest common subsequence of words, its share of the answer P and of what was expected R;
                 Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3. Mean over the
                 answers, 0 to 1
    BLEU         geometric mean of the precisions of 1 to 4 words in a row, over all answers, less for too short ones;
                 Papineni et al. 2002, "BLEU: a Method for Automatic Evaluation of Machine Translation",
                 section 2.3. 0 to 100

The loss is weighted by tokens, not by batches, so it does not depend on the batch size.

What a word is, is most of the last two, and figures compare only where it is the same: so they are left to
the packages that everybody's figures are from. To rouge-score a word is of the letters a to z and digits; for
other scripts take BLEU.
"""

import math
from collections.abc import Callable, Sequence

import torch

from minilora.data.chat import ChatTemplate
from minilora.data.examples import Example, Row, collate, prompt_ids
from minilora.data.tokenizer import Tokenizer
from minilora.inference.generation import end_tokens, generate_text
from minilora.loss import causal_lm_loss
from minilora.model import CausalLM
from minilora.system.errors import UserError, suggestion


@torch.no_grad()
def evaluate_loss(
    model: CausalLM, examples: Sequence[Example], batch_size: int = 8, pad_id: int = 0
) -> float:
    """Mean loss per supervised token, in nats. Dropout is off while it runs."""
    device, was_training = model.model.embed_tokens.weight.device, model.training
    model.eval()
    total = 0.0
    ordered = sorted(examples, key=lambda e: len(e.input_ids))
    for start in range(0, len(ordered), batch_size):
        input_ids, labels = collate(ordered[start : start + batch_size], pad_id)
        total += causal_lm_loss(model, input_ids.to(device), labels.to(device)).item()
    model.train(was_training)
    return total / sum(e.supervised for e in examples)


def perplexity(model: CausalLM, examples: Sequence[Example], batch_size: int = 8, pad_id: int = 0) -> float:
    """exp of the mean loss per supervised token: 1 is certainty, V a blind guess. Infinite where exp
    overflows.
    """
    return perplexity_of(evaluate_loss(model, examples, batch_size, pad_id))


def perplexity_of(loss: float) -> float:
    """exp(loss): infinite where that overflows, NaN where the loss is."""
    return math.inf if loss >= 700 else math.exp(loss)


def answers(
    model: CausalLM,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    batch_size: int = 64,
    slack: int = 8,
    template: ChatTemplate | None = None,  # words the rows that are conversations
) -> list[str]:
    """The greedy answer to each row's prompt, given `slack` tokens more than the longest expected answer to
    stop in.
    """
    was_training = model.training
    model.eval()
    room = max(len(tokenizer.encode(row.completion, bos=False)) for row in rows) + slack
    ends = end_tokens(model, tokenizer, template and template.end_id)
    prompts = [prompt_ids(row, tokenizer, template) for row in rows]
    texts = generate_text(
        model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=room, eos_token_ids=ends
    )
    model.train(was_training)
    return [text.strip() for text in texts]


def exact_match(texts: Sequence[str], rows: Sequence[Row]) -> float:
    """The share of answers that are the expected completion, character by character but for surrounding
    blanks.
    """
    return sum(text == row.completion.strip() for text, row in zip(texts, rows, strict=True)) / len(rows)


def load_metric(name: str) -> Callable[[Sequence[str], Sequence[Row]], float]:
    """`rouge` or `bleu`, as a function of answers and the rows they answer. Raises UserError if the package
    is missing.
    """
    if name not in ("rouge", "bleu"):
        raise UserError(f"metric {name!r} is not known{suggestion(name, ('rouge', 'bleu'))}")
    try:
        if name == "rouge":
            from rouge_score.rouge_scorer import RougeScorer

            scorer = RougeScorer(["rougeL"])
        else:
            from sacrebleu import corpus_bleu
    except ImportError as error:
        raise UserError(
            f"metric {name} needs the package {error.name}, which is missing: pip install 'minilora[metrics]'"
        ) from error

    def rouge(texts: Sequence[str], rows: Sequence[Row]) -> float:
        scores = [
            scorer.score(row.completion, text)["rougeL"].fmeasure
            for text, row in zip(texts, rows, strict=True)
        ]
        return sum(scores) / len(scores)

    def bleu(texts: Sequence[str], rows: Sequence[Row]) -> float:
        return corpus_bleu(texts, [[row.completion.strip() for row in rows]]).score

    return rouge if name == "rouge" else bleu
