"""Talk to a model and its adapters: line by line, one question, or a file of them.

    python scripts/chat.py --adapter outputs                                   a conversation; /help tells what else there is to say
    python scripts/chat.py --adapter outputs --instruction "Why is the sky blue?"                  one answer, and nothing else
    python scripts/chat.py --adapter outputs --input prompts.jsonl --output answers.jsonl          an answer to every row
    python scripts/chat.py --adapter sql=runs/a --adapter tutor=runs/b         /adapter tutor switches, /base does without

What is said is worded by the chat template: the tokenizer's own, which training leaves with the adapter, or
--template NAME; plain is the words alone. Without any there are no turns to tell apart, and every line is a
prompt that stands alone, as in training.

    --temperature 0.7  --top_p 0.9  --top_k 50       how answers are drawn; temperature 0: always the most likely token
    --repetition_penalty 1  --max_new_tokens 512  --seed 42
    --system TEXT                                    said before the conversation, where the template has a place for it

Besides, keys are the trainer's (`python scripts/train.py --help`), such as --quantization_bit none; those
that are not given are as in the run that made the first adapter, or the trainer's defaults.

A line that ends in \\ goes on in the next. The adapter of the default run reads "Question: Who lives in
Thimble?\\" and "Answer:".

Rows hold `prompt`, `instruction` (and `input`) or `messages`; each is worded as in training and comes back
with its `prediction`. Answers appear as they are made. Of a conversation only what is new goes through the
model: keys and values of the rest are still there from the last answer.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

from minilora.config import ModelConfig
from minilora.data.chat import ChatTemplate, Message, load_chat_template
from minilora.data.readers import read_records
from minilora.data.rows import alpaca_question
from minilora.data.tokenizer import Tokenizer
from minilora.formats.weights import read_config
from minilora.inference.assistant import Assistant, Settings, prompt_ids
from minilora.inference.load import (
    BASE,
    find_adapters,
    find_base,
    load_adapted,
    load_adapted_tokenizer,
    load_run_config,
)
from minilora.lora import adapter_names
from minilora.system.errors import ArgumentParser, UserError, run_script, suggestion, summarize
from minilora.system.files import check_writable, to_json, write_whole

UNWORDED = "there is no chat template to word"
HELP = """\
/settings            how answers are drawn
/set NAME VALUE      change that: /set temperature 0.2
/adapter [NAME]      answer with this adapter; without a name: which there are
/base                answer without an adapter
/clear               forget what was said
... \\                a line that ends in \\ goes on in the next one
/quit                or Ctrl-D; Ctrl-C ends an answer"""


def main() -> None:
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(__doc__, end="")
        return
    parser = ArgumentParser()
    parser.add_argument("--model", "--model_name_or_path")
    parser.add_argument("--adapter", action="append", default=[])
    for name in ("instruction", "system", "input", "output"):
        parser.add_argument(f"--{name}")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
    options, keys = parser.parse_known_args()
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    if options.instruction is not None and options.input:
        raise UserError("--instruction and --input are both given; choose one")
    if bool(options.input) != bool(options.output):
        raise UserError("--input and --output go together: the file of questions, and the file for answers")
    if options.output:
        check_writable("--output", Path(options.output))
    adapters = find_adapters(options.adapter)
    config = load_run_config(adapters, keys)
    base = find_base(options.model, adapters.values())
    tokenizer = load_adapted_tokenizer(base, adapters)
    template = load_chat_template(config.template, tokenizer)
    system: list[Message] = [{"role": "system", "content": options.system}] if options.system else []
    if template is None and system and not options.input:
        raise UserError(f"{UNWORDED} a system prompt; name one with --template")
    records = read_records(options.input) if options.input else []
    questions = [(place, *question(place, record)) for place, record in records]
    templates = dict.fromkeys((form for _, form, _ in questions), template)
    if (
        config.template is None
    ):  # then training leaves prompts as they are, and words instructions its own way
        templates["prompt"] = None
        if "instruction" in templates:
            templates["instruction"] = load_chat_template("alpaca", tokenizer)
    prompts = encode_rows(questions, templates, system, tokenizer, read_config(base))

    model = load_adapted(base, adapters, config)
    assistant = Assistant(model, tokenizer, template, settings, next(iter(adapters), None))
    if options.instruction is not None:
        for _ in shown(assistant.stream([*system, {"role": "user", "content": options.instruction}])):
            pass
    elif options.input:
        texts = assistant.answer_all(prompts, templates.values(), config.per_device_eval_batch_size)
        answered = [
            record | {"prediction": text.strip()} for (_, record), text in zip(records, texts, strict=True)
        ]
        write_whole(Path(options.output), "".join(to_json(record) + "\n" for record in answered))
        print(f"{len(answered)} answers by {next(iter(adapters), BASE)}: {options.output}")
    else:
        print(f"template: {template.name if template else 'none, every line stands alone'}; /help for help")
        converse(assistant, system)


def question(place: str, record: dict) -> tuple[str, list[Message]]:
    """A row's form, and the row as a conversation that waits for an answer."""
    if isinstance(messages := record.get("messages"), list) and messages:
        if not all(
            isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str)
            for m in messages
        ):
            raise UserError(f"{place}: messages must be objects with the texts role and content")
        return "messages", messages[:-1] if messages[-1][
            "role"
        ] == "assistant" else messages  # the expected answer is no question
    if isinstance(record.get("prompt"), str):
        return "prompt", [{"role": "user", "content": record["prompt"]}]
    if not record.get("instruction"):
        raise UserError(
            f"{place}: no text in prompt, instruction or messages; it has the columns {', '.join(record) or 'none'}"
        )
    return "instruction", alpaca_question(place, record)


def encode_rows(
    questions: list[tuple[str, str, list[Message]]],  # place, form, conversation
    templates: dict[str, ChatTemplate | None],
    system: list[Message],
    tokenizer: Tokenizer,
    model_config: ModelConfig,
) -> list[list[int]]:
    """The tokens of every row, worded as its form is. Raises UserError naming the rows that cannot be worded
    or answered.
    """
    prompts, positions = [], model_config.max_position_embeddings
    for place, form, messages in questions:
        if templates[form] is None and (system or form == "messages"):
            raise UserError(
                f"{place}: {UNWORDED} {'a system prompt' if system else 'messages'}; name one with --template"
            )
        try:
            prompts.append(prompt_ids(system + messages, tokenizer, templates[form], model_config.vocab_size))
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
    lengths = [(place, len(prompt)) for (place, *_), prompt in zip(questions, prompts, strict=True)]
    if too_long := [f"{place} is {length} tokens long" for place, length in lengths if length >= positions]:
        raise UserError(
            f"{summarize(too_long)}; the model has {positions} positions for prompt and answer: shorten these rows"
        )
    return prompts


def shown(pieces: Iterator[str]) -> Iterator[str]:
    """The same pieces, printed as they come."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            yield piece
    finally:
        print()


def converse(assistant: Assistant, system: list[Message]) -> None:
    """Questions and commands from the terminal, until there are no more."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  the line can be edited, and earlier ones come back
    messages = list(system)
    while True:
        try:
            line = read_question()
        except EOFError:
            line = "/quit"
        try:
            if line == "/quit":
                return
            if line == "/clear":
                messages = list(system)
            elif line.startswith("/"):
                obey(assistant, *line[1:].split())
            elif line:
                asked, answer = [*messages, {"role": "user", "content": line}], ""
                with contextlib.suppress(KeyboardInterrupt):
                    for piece in shown(assistant.stream(asked)):
                        answer += piece
                messages = [*asked, {"role": "assistant", "content": answer}]
        except UserError as error:
            print(f"error: {error}")


def read_question() -> str:
    """A line from the terminal, or several, each but the last of which ends in a backslash."""
    text = input("> ")
    while text.endswith("\\"):
        text = text[:-1] + "\n" + input("  ")
    return text.strip()


def obey(assistant: Assistant, command: str = "help", *arguments: str) -> None:
    """One command of the conversation."""
    match command, *arguments:
        case ["help"]:
            print(HELP)
        case ["settings"]:
            drawn = ", ".join(f"{name} {value}" for name, value in asdict(assistant.settings).items())
            print(f"answers by {assistant.adapter or BASE}; {drawn}")
        case ["set", name, value]:
            assistant.change(assistant.settings.changed(name, value))
        case ["adapter"]:
            print(
                ", ".join(adapter_names(assistant.model))
                or "none were loaded; start with --adapter DIRECTORY"
            )
        case ["adapter", name]:
            assistant.switch(name)
        case ["base"]:
            assistant.switch(None)
        case _:
            known = "help settings set adapter base clear quit".split()
            fault = (
                "takes other words; see /help"
                if command in known
                else f"is no command{suggestion(command, known)}"
            )
            raise UserError(f"/{command} {fault}")


if __name__ == "__main__":
    run_script(main)
