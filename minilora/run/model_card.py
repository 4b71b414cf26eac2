"""README.md of an output directory: what a stranger needs to judge an adapter and to use it.

The card speaks of the adapter beside it, and its snippet runs as it is: it loads base, adapter and tokenizer,
and asks a question in the form that training had. The question is an invented one, because a card is shared
more widely than the rows of a dataset.
"""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from minilora.config import LoraConfig
from minilora.data.chat import TOKENIZER_TEMPLATE
from minilora.data.mask_view import readable
from minilora.initialize import takes_part_of_base
from minilora.run.datasets import token_settings
from minilora.run.describe import describe_optimizer, describe_targets
from minilora.run.plan import Plan
from minilora.system.errors import UserError
from minilora.system.files import write_whole
from minilora.system.terminal import visible

QUESTION = "Why is the sky blue?"
MODEL_CARD = """---
{link}library_name: {library}
pipeline_tag: text-generation
tags:
{tag}- minilora
---

# {kind} {title}

Trained with minilora. {size}

| | |
|---|---|
{table}

![loss](loss.png)

## Prompt format

{form}

## Use

```python
{load}

{ask}
output = model.generate(**inputs, max_new_tokens=100, eos_token_id={ends})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
{quantized}
All settings are in `training_config.yaml`, all measurements in `metrics.jsonl`.
"""
LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base_model!r}, dtype="auto")
{resize}model = PeftModel.from_pretrained(base, {address!r})
tokenizer = AutoTokenizer.from_pretrained({address!r}, config=base.config)"""
LOAD_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({address!r}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({address!r})"""
ASK_WITH_TEMPLATE = """messages = [{{"role": "user", "content": {question!r}}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
ASK_AS_WRITTEN = """prompt = {prompt!r}
inputs = tokenizer(prompt{options}, return_tensors="pt")"""
QUANTIZED = """
Training saw the base model's weights in {weights}.
On others, such as unquantized ones, the adapter gives slightly other answers.
"""


class PromptFormat(NamedTuple):
    """How training wrote a prompt."""

    name: str
    words: str
    example: str  # QUESTION in this form, without BOS; empty: the template refuses it
    template: bool  # whether a chat template writes it


def write_model_card(plan: Plan, figures: Mapping[str, str]) -> None:
    """Write README.md, which the hub shows: the adapter's settings, its figures, and how to use it.

    The hub links to a base model of its own. A local directory is only named in the text.
    """
    base_model, lora, form = plan.base_model, plan.lora, prompt_format(plan)
    on_hub = (
        re.fullmatch(r"[\w.-]+/[\w.-]+", base_model)
        and not base_model.startswith("assets/")
        and not Path(base_model).exists()
    )
    rows = plan.model_config.vocab_size
    grown = rows > plan.base_config.vocab_size  # PEFT wants the base model to have these rows
    table = settings_in_card(plan, form) | dict(figures)
    load = (LOAD_MODEL if plan.trains_all else LOAD_ADAPTER).format(
        base_model=str(base_model),
        resize=f"base.resize_token_embeddings({rows})\n" if grown else "",
        address=str(plan.config.push_to_hub or plan.output_dir),
    )
    card = MODEL_CARD.format(
        link=f"base_model: {base_model}\n" if on_hub else "",
        library="transformers" if plan.trains_all else "peft",
        tag="" if plan.trains_all else "- lora\n",
        kind="Full fine-tune of" if plan.trains_all else "LoRA adapter for",
        title=as_markdown(base_model),
        size="All weights were trained." if plan.trains_all else _size_in_card(lora),
        load=load,
        table="\n".join(f"| {as_markdown(name)} | {as_markdown(value)} |" for name, value in table.items()),
        form=f"{form.words}\n\n{_indented(form.example)}" if form.example else form.words,
        ask=_ask(plan, form),
        ends=_end_ids(plan, form),
        quantized=QUANTIZED.format(weights=figures["frozen weights"]) if plan.config.quant_config() else "",
    )
    write_whole(plan.output_dir / "README.md", card)


def settings_in_card(plan: Plan, form: PromptFormat) -> dict[str, str]:
    """The rows of the card's table that are known before the training."""
    config, schedule = plan.config, plan.schedule
    rate = f"{schedule.peak:g}, {schedule.name}"
    if schedule.warmup_steps:
        rate += f", warmup_steps = {schedule.warmup_steps}"
    held_out = "none"
    if plan.eval_set:
        source = _names(config.eval_dataset) if config.eval_dataset else f"val_size = {config.val_size:g}"
        held_out = f"{len(plan.eval_set):,} ({source})"
    return {
        "dataset": _names(config.dataset),
        "held-out examples": held_out,
        "prompt format": form.name,
        "cutoff_len": str(token_settings(config, plan.model_config)["cutoff_len"]),
        "learning rate": rate,
        "optimizer": describe_optimizer(config.optim, plan.placement.device, config.loraplus_lr_ratio),
        "seed": str(config.seed),
    }


def prompt_format(plan: Plan) -> PromptFormat:
    """How training wrote its prompts, with QUESTION as an example."""
    if plan.template is not None:
        own = plan.template.name == TOKENIZER_TEMPLATE
        name = "the tokenizer's own chat template" if own else f"chat template {plan.template.name}"
        words = "The chat template that is saved with the tokenizer writes a question as"
        example = ""
        with contextlib.suppress(UserError):  # a template may refuse a conversation of one question
            ids = plan.template.encode_prompt([{"role": "user", "content": QUESTION}])
            example = readable(ids, plan.tokenizer)
        if not example:
            words = "The chat template that is saved with the tokenizer writes the prompts."
        return PromptFormat(name, words, example, True)
    if all(row.prompt is None for row in plan.train_set.rows):
        return PromptFormat("none, plain text", "The model continues a text, such as", "The", False)
    words = "A prompt is used as it is written, without a chat template, such as"
    return PromptFormat("none, the prompt as it is written", words, QUESTION, False)


def _ask(plan: Plan, form: PromptFormat) -> str:
    """The lines of the snippet that make the prompt.

    transformers reads a `tokenizer.json` as training did. With a `tokenizer.model` it puts BOS and the "▁" in
    front of a text or leaves them out, as other files say. So the prompt has both, and it adds nothing; a
    template's prompt, too, unless it holds other special tokens.
    """
    tokenizer, reads_json = plan.tokenizer, (plan.output_dir / "tokenizer.json").is_file()
    bos = tokenizer.special_tokens["bos_token"] if tokenizer.puts_bos else ""
    prompt, options = form.example.removeprefix(bos) if form.template else form.example, ""
    if form.template:
        ids = plan.template.encode_prompt([{"role": "user", "content": QUESTION}]) if form.example else []
        if reads_json or not ids or any(map(tokenizer.is_special, ids[bool(bos) :])):
            return ASK_WITH_TEMPLATE.format(question=QUESTION)
    if not reads_json:
        first = tokenizer.token(tokenizer.encode(prompt, bos=False)[0])
        prompt, options = bos + " " * first.startswith("▁") + prompt, ", add_special_tokens=False"
    return ASK_AS_WRITTEN.format(prompt=prompt, options=options)


def _end_ids(plan: Plan, form: PromptFormat) -> list[int]:
    """The tokens that end an answer: the model's, the tokenizer's, and the chat template's."""
    ends = {*plan.model_config.eos_token_ids, plan.tokenizer.eos_id}
    if form.template:
        with contextlib.suppress(UserError):  # a template that refuses the simplest conversation
            ends.add(plan.template.end_id)
    return sorted(ends - {None})


def _names(datasets: str | list[str] | None) -> str:
    return ", ".join(map(str, datasets)) if isinstance(datasets, list) else str(datasets)


def _indented(text: str) -> str:
    """A block of code that no text in it can end."""
    return "\n".join(f"    {line}" for line in visible(text).split("\n"))


def _size_in_card(lora: LoraConfig) -> str:
    """An adapter's size, its dropout and its layers, in a sentence."""
    scaling = "alpha / sqrt(r)" if lora.use_rslora else "alpha / r"
    size = f"Rank {lora.r}, alpha {lora.lora_alpha:g} (scaling {scaling})"
    if lora.use_vera:
        size = f"VeRA of rank {lora.r}"
    if takes_part_of_base(lora.init_lora_weights):
        size += f", started with {lora.init_lora_weights} and saved as plain LoRA of rank {2 * lora.r}"
    return f"{size}, dropout {lora.lora_dropout:g}, on: {as_markdown(describe_targets(lora, ', '))}."


def as_markdown(text: str) -> str:
    """Text in one line that Markdown shows as it is: no markup, no HTML, no cell of a table begins in it."""
    return re.sub(r"[\\`*\[\]<>|&~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))
