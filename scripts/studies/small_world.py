"""What the studies share: the small model of assets/, its questions and texts, training, and three figures.

The model has 1.9 million parameters. It has read texts about a thousand invented people, which
scripts/dev/world.py makes, and has never seen a question. It trains here on questions about 500 of them, and
is asked about the others. The figures of a model:

    held_out_loss   mean loss of an answer's token, in nats, over 500 questions about the others
    right_answers   share of those questions that it answers word for word, greedily
    perplexity      exp of the mean loss of a token, over texts that it has not read, about the same people

Everything is float32 on the CPU: bfloat16 would add its own rounding to what is compared. Steps take 16
questions in an order that the seed draws anew each epoch. The optimizer is AdamW with PyTorch's defaults and
no weight decay; gradients are not clipped. A schedule is `linear`, from the learning rate down to 0 without
warm-up, or `constant`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice

import numpy as np
import torch
from torch import nn

from minilora.config import LoraConfig
from minilora.data.examples import Dataset, Example, collate, tokenize
from minilora.data.rows import read_rows
from minilora.data.tokenizer import Tokenizer, load_tokenizer
from minilora.formats.weights import load_model
from minilora.inference.evaluation import answers, evaluate_loss, exact_match, perplexity_of
from minilora.lora import add_lora, trainable_parameters
from minilora.loss import causal_lm_loss
from minilora.model import CausalLM
from minilora.optim import Schedule, make_optimizer, set_learning_rate
from minilora.system.assets import ASSETS, EMBEDDED_MODEL
from minilora.system.errors import UserError

QUESTIONS_A_STEP = 16
LONGEST_TEXT = 128  # tokens, as in pretraining


# ---- the model, the questions, the texts -------------------------------------------------------------------


def load(lora: LoraConfig | None = None, seed: int = 0) -> CausalLM:
    """Return the small model in float32, frozen, and with `lora` an adapter on it whose A the seed draws."""
    model = load_model(EMBEDDED_MODEL, dtype=torch.float32)
    model.requires_grad_(False)
    if lora is not None:
        torch.manual_seed(seed)
        add_lora(model, lora)
    return model


def load_to_train_all(which: str = "") -> CausalLM:
    """Return the small model in float32, with every weight to be trained whose name ends in `which`."""
    model = load()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(which))
    return model


def linear_layers(model: CausalLM) -> dict[str, nn.Linear]:
    """Return full name -> linear layer of the decoder: the 28 that `all-linear` means."""
    layers = model.model.named_modules()
    return {f"model.{name}": layer for name, layer in layers if isinstance(layer, nn.Linear)}


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(EMBEDDED_MODEL)


@cache
def questions(name: str) -> Dataset:
    """Return the questions of assets/: `train`, 3,000 about one half of the people, or `test`, 500."""
    return tokenize(read_rows(str(ASSETS / f"{name}.jsonl")), tokenizer(), cutoff_len=64)


@cache
def texts(count: int, seed: int = 1) -> list[Example]:
    """Return `count` texts of the kind that the model has read. It has read those of seed 0."""
    try:
        from world import documents, people
    except ImportError as error:
        raise UserError(
            "texts are made by scripts/dev/world.py, which is missing: run this in a clone"
        ) from error
    examples = []
    for text in islice(documents(people(), seed), count):
        ids = np.array(tokenizer().encode(text, eos=True)[:LONGEST_TEXT], dtype=np.int32)
        examples.append(Example(ids, np.arange(len(ids)) > 0, (len(ids),)))
    return examples


# ---- training ----------------------------------------------------------------------------------------------


def train(
    model: CausalLM,
    learning_rate: float,
    steps: int,
    seed: int = 0,
    schedule: str = "linear",  # of SCHEDULES in optim.py; none of them warms up here
    optim: str = "adamw_torch",  # of OPTIMIZERS in optim.py
    after: Callable[[int], object] = lambda step: None,  # is called with the number of finished steps
) -> None:
    """Train the parameters that want gradients. Stops early where the loss is no longer finite."""
    rates = Schedule(schedule, learning_rate, steps)
    optimizer = make_optimizer(optim, trainable_parameters(model), learning_rate, weight_decay=0.0)
    model.train()
    for step, examples in enumerate(batches(seed, steps)):
        set_learning_rate(optimizer, rates.learning_rate(step))
        ids, labels = collate(examples, tokenizer().pad_id)
        loss = causal_lm_loss(model, ids, labels) / (labels >= 0).sum()
        if not math.isfinite(loss.item()):
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after(step + 1)
    model.eval()


def batches(seed: int, steps: int) -> Iterator[list[Example]]:
    """Yield the examples of each step. Every epoch is a new permutation of all training questions."""
    examples, generator, order = questions("train").examples, np.random.default_rng(seed), []
    for _ in range(steps):
        if len(order) < QUESTIONS_A_STEP:
            order = generator.permutation(len(examples)).tolist()
        yield [examples[order.pop()] for _ in range(QUESTIONS_A_STEP)]


# ---- three figures of a model ------------------------------------------------------------------------------


def held_out_loss(model: CausalLM, count: int | None = None) -> float | None:
    """Return the mean loss of an answer's token, in nats; None if it is not finite."""
    return figure_of(evaluate_loss(model, questions("test").examples[:count], batch_size=64))


def right_answers(model: CausalLM, count: int | None = None) -> float:
    """Return the share of the held-out questions that the model answers word for word."""
    rows = questions("test").rows[:count]
    return figure_of(exact_match(answers(model, tokenizer(), rows, progress=""), rows))


def perplexity(model: CausalLM, count: int = 200) -> float | None:
    """Return the perplexity of `count` texts that the model has not read; None if it is not finite."""
    return figure_of(perplexity_of(evaluate_loss(model, texts(count), batch_size=32)))


def figure_of(value: float) -> float | None:
    """Return four digits of a number for a JSON file, which knows no NaN: then None."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


# ---- figures of many runs ----------------------------------------------------------------------------------


def rate_search(
    name: str,  # of what is trained, for the lines that are printed
    start: Callable[[int], CausalLM],  # seed -> the model to train
    rates: Sequence[float],
    steps: int,
    seeds: Sequence[int],
    measured: Callable[[CausalLM], float | None] = held_out_loss,
) -> dict:
    """Train with seed 0 at every rate, then with other seeds at the best one.

    Returns parameters (how many are trained), rates, losses, best_rate, and seed_losses at the best rate.
    Seed 0 has chosen the rate and is left out there: its loss is the lowest of several, so it is too low.
    """

    def loss_at(rate: float, seed: int) -> float | None:
        model = start(seed)
        train(model, rate, steps, seed)
        loss = measured(model)
        print(f"  {name}: rate {rate:.2e}, seed {seed}: {loss}", flush=True)
        return loss

    parameters = sum(p.numel() for p in trainable_parameters(start(0)).values())
    losses = [loss_at(rate, seed=0) for rate in rates]
    _, best = min((loss, rate) for loss, rate in zip(losses, rates, strict=True) if loss is not None)
    seed_losses = [loss_at(best, seed) for seed in seeds]
    found = dict(parameters=parameters, rates=list(rates), losses=losses, best_rate=best)
    return found | dict(seed_losses=seed_losses)


def within(values: Sequence[float]) -> str:
    """Return the mean of some values and half of their range, such as 0.151 ± 0.004."""
    return f"{sum(values) / len(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"
