"""Pretrain the default base model: a Llama of 2 million parameters that knows only a small invented world.

    python scripts/dev/pretrain.py     rewrites assets/, under 25 minutes on 2 cores

    --output FOLDER    default: assets
    --steps N          of 3,072 tokens; default: 2400
    --seed N           of the world, the texts and the initial weights; default: 0

    world -> texts -> sentencepiece vocabulary -> packed rows -> AdamW
        -> assets/base, assets/train.jsonl, assets/test.jsonl

The base model learns to continue text. Afterwards it knows where everyone lives, but a question makes it
ramble on. The adapter's task is to turn this knowledge into answers.

Two measures help the adapter. The texts tell each fact in many wordings (see `world.py`). And each step takes
its gradient at weights that random noise has moved, by up to the size of 4-bit rounding errors. AdamW then
minimizes the average loss over a neighbourhood of the weights, so the facts survive quantization. This is the
idea of Bishop 1995, "Training with Noise is Equivalent to Tikhonov Regularization", applied to weights.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import argparse
import contextlib
import io
import json
import math
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor
from world import Person, documents, people, questions

from minilora.config import ModelConfig
from minilora.formats.weights import save_model
from minilora.model import CausalLM
from minilora.system.errors import ArgumentParser, UserError, local_path, run_script
from minilora.system.files import make_folder, write_whole

BOS, EOS = 1, 2
ROW, ROWS = 128, 24  # tokens of a row, rows of a batch
LEARNING_RATE, WARMUP_STEPS = 3e-3, 100
NOISE = (
    0.08  # at the last step, as a share of a matrix's root mean square; NF4's rounding error is about 0.09
)
CONFIG = ModelConfig(
    model_type="llama", vocab_size=1500, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=6, num_key_value_heads=2, head_dim=32, layer_windows=(None,) * 4,
    max_position_embeddings=256, tie_word_embeddings=True, dtype="bfloat16",
    bos_token_id=BOS, eos_token_ids=(EOS,),
)  # fmt: skip


def main() -> None:
    arguments = parse_arguments()
    output, seed, steps = Path(arguments.output), arguments.seed, arguments.steps
    inhabitants = people(seed=seed)
    tokenizer_model = train_tokenizer(inhabitants, seed)
    tokenizer = SentencePieceProcessor(model_proto=tokenizer_model)
    model = CausalLM(CONFIG)
    model.init_weights(seed=seed)
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(inhabitants)} people, {size:,} parameters, {steps * ROW * ROWS:,} tokens")
    train(model, tokenizer, inhabitants, steps, seed)

    save_model(model.bfloat16(), output / "base")
    model.float()  # the figures below are those of the rounded weights, as they were saved
    write_whole(output / "base" / "tokenizer.model", tokenizer_model)
    for name, records in zip(("train", "test"), questions(inhabitants, seed), strict=True):
        write_whole(output / f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    print(f"written to {output}; facts recalled: {recall(model, tokenizer, inhabitants, 1000):.1%}")
    one, other = inhabitants[0].name, inhabitants[1].name
    for prompt in (f"{one} lives in", f"In the evening, {other}", records[0]["prompt"]):
        print(f"  {prompt!r} -> {ramble(model, tokenizer, prompt)!r}")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(help_text=__doc__)
    parser.add_argument("--output", type=local_path, default="assets")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.steps < 1:
        raise UserError(f"--steps must be a positive whole number, not {arguments.steps}")
    make_folder("--output", arguments.output)  # before the training, not after it
    make_folder("--output", arguments.output / "base")
    return arguments


def train_tokenizer(inhabitants: list[Person], seed: int) -> bytes:
    """Return a byte-fallback BPE vocabulary of the world's texts: any text round-trips, names are short."""
    lines = (line for text in islice(documents(inhabitants, seed), 6000) for line in text.split("\n"))
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=CONFIG.vocab_size,
        byte_fallback=True, normalization_rule_name="identity", character_coverage=1.0, split_digits=True,
        remove_extra_whitespaces=False, add_dummy_prefix=True, unk_id=0, bos_id=BOS, eos_id=EOS, pad_id=-1,
        num_threads=1, shuffle_input_sentence=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def batches(tokenizer: SentencePieceProcessor, inhabitants: list[Person], seed: int) -> Iterator[Tensor]:
    """Yield batches, (ROWS, ROW + 1), without end. A row holds whole texts; the last one is cut."""
    texts, rows = documents(inhabitants, seed), []
    while True:
        row: list[int] = []
        while len(row) < ROW + 1:
            row += [BOS, *tokenizer.encode(next(texts)), EOS]
        rows.append(row[: ROW + 1])
        if len(rows) == ROWS:
            yield torch.tensor(rows)
            rows = []


def train(
    model: CausalLM, tokenizer: SentencePieceProcessor, inhabitants: list[Person], steps: int, seed: int
) -> None:
    """Train with AdamW, every gradient taken at noisy weights. Print a line each 100 steps."""
    noisy = [p for name, p in model.named_parameters() if name.endswith("_proj.weight")]  # the quantized ones
    optimizer = make_optimizer(model)
    generator = torch.Generator().manual_seed(seed)
    started, total = time.perf_counter(), 0.0
    for step, batch in enumerate(islice(batches(tokenizer, inhabitants, seed), steps), start=1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate_factor(step, steps)
        with moved_by_noise(noisy, NOISE * step / steps, generator):
            logits = model(batch[:, :-1])  # (Bt, T, V)
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % 100 == 0 or step == steps:
            seconds, known = time.perf_counter() - started, recall(model, tokenizer, inhabitants, 200)
            mean, speed = total / (step % 100 or 100), step * ROW * ROWS / seconds
            left = f"{seconds / step * (steps - step) / 60:.1f} min left"
            print(f"step {step:5d}/{steps} | loss {mean:.3f} | facts recalled {known:4.0%} | "
                  f"{speed:,.0f} tokens/s | {left}", flush=True)  # fmt: skip
            total = 0.0


def make_optimizer(model: CausalLM) -> torch.optim.AdamW:
    """Return AdamW with weight decay for the matrices only."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def rate_factor(step: int, steps: int) -> float:
    """Return the learning rate of a step as a share of the highest: linear warm-up, then a cosine to 0."""
    warmup = min(WARMUP_STEPS, steps // 10 + 1)
    decay = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))
    return min(step / warmup, decay)


@contextlib.contextmanager
def moved_by_noise(weights: list[Tensor], size: float, generator: torch.Generator) -> Iterator[None]:
    """Add normal noise of `size` times each weight's root mean square; restore the weights at the end."""
    exact = [p.detach().clone() for p in weights]
    with torch.no_grad():
        for p in weights:
            noise = torch.empty_like(p).normal_(generator=generator)
            p.add_(noise, alpha=size * p.square().mean().sqrt().item())
    yield
    with torch.no_grad():
        for p, before in zip(weights, exact, strict=True):
            p.copy_(before)


@torch.no_grad()
def recall(
    model: CausalLM, tokenizer: SentencePieceProcessor, inhabitants: list[Person], count: int
) -> float:
    """Return the share of `count` facts whose first piece the model predicts.

    For example: 'Mira Oldwater lives in' -> 'Willowmere'.
    """
    stems = {"town": "lives in", "pet": "calls the animal", "dish": "could eat", "instrument": "plays the"}
    rng, right = random.Random(0), 0
    for _ in range(count):
        person, kind = rng.choice(inhabitants), rng.choice(list(stems))
        ids = torch.tensor([[BOS, *tokenizer.encode(f"{person.name} {stems[kind]}")]])  # (1, T)
        right += int(model(ids)[0, -1].argmax()) == tokenizer.encode(person.facts[kind])[0]
    return right / count


@torch.no_grad()
def ramble(model: CausalLM, tokenizer: SentencePieceProcessor, prompt: str, new_tokens: int = 40) -> str:
    """Return the model's greedy continuation of the prompt."""
    ids = [BOS, *tokenizer.encode(prompt)]
    start = len(ids)
    while len(ids) < start + new_tokens and ids[-1] != EOS:
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return tokenizer.decode([i for i in ids[start:] if i != EOS])


if __name__ == "__main__":
    run_script(main)
