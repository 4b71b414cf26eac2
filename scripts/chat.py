"""Talk to a model and its adapters: in a conversation, with one question, or with a file of questions.

    # a conversation; /help lists the commands
    python scripts/chat.py --adapter outputs
    # one answer, and nothing else
    python scripts/chat.py --adapter outputs --instruction "Why is the sky blue?"
    # an answer to every row of a file; with several adapters, a row may choose one
    python scripts/chat.py --adapter outputs --input prompts.jsonl --output answers.jsonl
    # two adapters; /adapter tutor switches to the second one, /base to the model alone
    python scripts/chat.py --adapter sql=runs/a --adapter tutor=runs/b

The chat template formats what you type: by default the tokenizer's own, which training saves with the
adapter, or --template NAME; plain adds nothing to the words. Without any template, the model cannot tell one
turn from the next, so every line is a separate prompt, as in training.

    --model DIR                                   default: the model that the adapters name
    --temperature 0.7  --top_p 0.9  --top_k 50    how tokens are sampled; temperature 0: the most likely one
    --repetition_penalty 1  --max_new_tokens 512  --seed 42
    --system TEXT                                 the system prompt, if the template supports one

All other keys are the trainer's (`python scripts/train.py --help`). Keys that are not given keep the value of
the first adapter's run, or the trainer's default. Two do not: the dtype is the one that is fast on this
machine (--bf16 false: float32), and without a run the weights stay as they are stored (--quantization_bit 4:
NF4). An adapter of QLoRA speaks on the quantized weights that it was trained on. On a CPU the stored ones,
--quantization_bit none, are faster.

A line that ends in \\ continues on the next one. The adapter of the default run expects two lines:
"Question: Who lives in Thimble?\\" and "Answer:".

Rows of a file hold `prompt`, `instruction` (and `input`) or `messages`. Each row is formatted as in training
and is written with its answer as `prediction`, and as `adapter` the name of who answered. A row may choose
that itself, by a column `adapter`: a name that --adapter gives, or "base", null or nothing for the model
alone. Without the column, the first adapter answers. Rows of all adapters are answered in the same batches,
of per_device_eval_batch_size rows.

Answers to single questions appear token by token. In a conversation only new tokens go through the model: the
KV cache keeps the earlier ones.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

from minilora.data.chat import ChatTemplate, Message, load_chat_template
from minilora.data.readers import read_records
from minilora.data.rows import alpaca_question
from minilora.inference.assistant import Assistant, GenerationSettings, encode_question
from minilora.inference.load import BASE, InferenceSetup, add_model_options, prepare_inference
from minilora.rope import context_length
from minilora.run.settings import parse_with_keys
from minilora.system.errors import ArgumentParser, UserError, local_path, run_script, suggestion, summarize
from minilora.system.files import check_writable, refuse_overwrite, to_json, write_whole
from minilora.system.schema import shown
from minilora.system.terminal import visible
from minilora.wrapping import adapter_names

HELP = """\
/settings            show how answers are generated
/set NAME VALUE      change one of these settings: /set temperature 0.2
/adapter [NAME]      answer with this adapter; without a name: list the adapters
/base                answer without an adapter
/clear               start a new conversation
... \\                a line that ends in \\ continues on the next one
/quit                or Ctrl-D; Ctrl-C ends an answer"""
COMMANDS = ("help", "settings", "set", "adapter", "base", "clear", "quit")


class Question(NamedTuple):
    """A row of --input as a conversation that waits for an answer."""

    location: str  # file and line, for error messages
    form: str  # the column that held it: messages, prompt or instruction
    messages: list[Message]
    adapter: str | None = None  # that answers; None: the model alone


def main() -> None:
    options, keys = parse_options()
    settings = GenerationSettings(**{f.name: getattr(options, f.name) for f in fields(GenerationSettings)})
    setup = prepare_inference(options.model, options.adapter, keys)
    system: list[Message] = [{"role": "system", "content": options.system}] if options.system else []
    if options.input:
        refuse_overwrite("--output", options.output, [options.input, *setup.files])
        answer_file(setup, settings, system, options.input, options.output)
        return
    if setup.template is None and system:
        raise UserError("a system prompt needs a chat template; choose one with --template")
    assistant = load_assistant(setup, settings)
    if options.instruction is not None:
        for _ in echo(assistant.stream([*system, user_message(options.instruction)])):
            pass
    else:
        name = setup.template.name if setup.template else "none, every line is a separate prompt"
        print(f"template: {name}; /help for help")
        converse(assistant, system)


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    """This script's options, checked, and the trainer's keys."""
    parser = ArgumentParser(help_text=__doc__)
    add_model_options(parser)
    for name in ("instruction", "system", "input"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--output", type=local_path)
    for field in fields(GenerationSettings):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
    options, keys = parse_with_keys(parser)
    if options.instruction is not None and options.input:
        raise UserError("--instruction and --input are both given; choose one")
    if bool(options.input) != bool(options.output):
        raise UserError("--input and --output go together: the file of questions, and the file for answers")
    if options.output:
        check_writable("--output", options.output)
    return options, keys


def load_assistant(setup: InferenceSetup, settings: GenerationSettings) -> Assistant:
    return Assistant(setup.load_model(), setup.tokenizer, setup.template, settings, setup.first_adapter)


def user_message(text: str) -> Message:
    return {"role": "user", "content": text}


# ---- a file of questions ---------------------------------------------------------------------------------


def answer_file(
    setup: InferenceSetup, settings: GenerationSettings, system: list[Message], source: str, output: Path
) -> None:
    """Write every row of a file to `output`, with the model's answer as `prediction` and whose it is."""
    records = read_records(source)
    questions = [
        parse_question(location, record)._replace(adapter=adapter_of(location, record, setup))
        for location, record in records
    ]
    template = choose_template(questions, setup)
    prompts = encode_questions(questions, template, system, setup)
    assistant = load_assistant(setup, settings)
    adapter_ids = [question.adapter for question in questions]
    texts = assistant.answer_all(prompts, [template], setup.config.per_device_eval_batch_size, adapter_ids)
    who = [name or BASE for name in adapter_ids]
    answered = [
        record | {"adapter": name, "prediction": text.strip()}
        for (_, record), name, text in zip(records, who, texts, strict=True)
    ]
    write_whole(output, "".join(to_json(record, default=str) + "\n" for record in answered))
    print(f"{len(answered)} answers by {', '.join(dict.fromkeys(who))}: {output}")


def parse_question(location: str, record: dict) -> Question:
    """A row as a question. Raises UserError if it holds no text to answer."""
    if isinstance(messages := record.get("messages"), list) and messages:
        if not all(
            isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str)
            for m in messages
        ):
            raise UserError(f"{location}: messages must be objects with the texts role and content")
        if messages[-1]["role"] == "assistant":  # the expected answer
            messages = messages[:-1]
        return Question(location, "messages", messages)
    if isinstance(record.get("prompt"), str):
        return Question(location, "prompt", [user_message(record["prompt"])])
    if not record.get("instruction"):
        columns = ", ".join(record) or "none"
        raise UserError(
            f"{location}: no text in prompt, instruction or messages; it has the columns {columns}"
        )
    return Question(location, "instruction", alpaca_question(location, record))


def adapter_of(location: str, record: dict, setup: InferenceSetup) -> str | None:
    """The adapter that a row chooses, or the first one. Raises UserError for one that is not there."""
    name = record.get("adapter", setup.first_adapter)
    if name in (None, "", BASE):
        return None
    if not isinstance(name, str) or name not in setup.adapters:
        near = suggestion(shown(name).strip("'"), [*setup.adapters, BASE])
        raise UserError(f"{location}: adapter {shown(name)} is none that --adapter NAME=DIR gives{near}")
    return name


def choose_template(questions: Sequence[Question], setup: InferenceSetup) -> ChatTemplate | None:
    """The template for all rows, as in training: Alpaca's wording only where the model has no template."""
    if setup.template is None and any(question.form == "instruction" for question in questions):
        return load_chat_template("alpaca", setup.tokenizer)
    return setup.template


def encode_questions(
    questions: Sequence[Question],
    template: ChatTemplate | None,
    system: list[Message],
    setup: InferenceSetup,
) -> list[list[int]]:
    """The token ids of every question, formatted by the template.

    Raises UserError that names the rows which cannot be formatted or leave no room for an answer.
    """
    prompts, too_long = [], []
    positions = context_length(setup.model_config)
    for location, form, messages, _ in questions:
        if template is None and (system or form == "messages"):
            subject = "a system prompt needs" if system else "messages need"
            raise UserError(f"{location}: {subject} a chat template; choose one with --template")
        try:
            prompt = encode_question(
                system + messages, setup.tokenizer, template, setup.model_config.vocab_size
            )
        except UserError as error:
            raise UserError(f"{location}: {error}") from error
        prompts.append(prompt)
        if len(prompt) >= positions:
            too_long.append(f"{location} is {len(prompt)} tokens long")
    if too_long:
        raise UserError(
            f"{summarize(too_long)}; the model has {positions} positions for prompt and answer: "
            "shorten these rows"
        )
    return prompts


# ---- a conversation --------------------------------------------------------------------------------------


def converse(assistant: Assistant, system: list[Message]) -> None:
    """Answer questions and run commands from the terminal, until /quit or the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing and a history
    messages = list(system)
    while True:
        try:
            line = read_question()
        except EOFError:
            return
        try:
            if line == "/quit":
                return
            if line == "/clear":
                messages = list(system)
            elif line.startswith("/"):
                run_command(assistant, *line[1:].split())
            elif line:
                messages = continue_conversation(assistant, [*messages, user_message(line)])
        except UserError as error:
            print(f"error: {error}")


def read_question() -> str:
    """One line from the terminal, joined with the next one as long as it ends in a backslash."""
    try:
        text = input("> ")
        while text.endswith("\\"):
            text = text[:-1] + "\n" + input("  ")
        return text.strip()
    except UnicodeDecodeError as error:
        problem = f"the line is not {error.encoding}, the encoding of this terminal"
        raise UserError(f"{problem}; set PYTHONIOENCODING to the right one, such as utf-8") from error


def continue_conversation(assistant: Assistant, messages: list[Message]) -> list[Message]:
    """Print the answer to `messages` and return them with it. Ctrl-C ends the answer early."""
    answer = ""
    with contextlib.suppress(KeyboardInterrupt):
        for piece in echo(assistant.stream(messages)):
            answer += piece
    return [*messages, {"role": "assistant", "content": answer}]


def echo(pieces: Iterator[str]) -> Iterator[str]:
    """Yield the same pieces and print each one at once; end with a line break."""
    try:
        for piece in pieces:
            print(visible(piece), end="", flush=True)
            yield piece
    finally:
        print()


def run_command(assistant: Assistant, command: str = "help", *arguments: str) -> None:
    """Run one of the conversation's commands. Raises UserError for a mistake in it."""
    match command, *arguments:
        case ["help"]:
            print(HELP)
        case ["settings"]:
            values = ", ".join(f"{name} {value}" for name, value in asdict(assistant.settings).items())
            print(f"answers by {assistant.adapter or BASE}; {values}")
        case ["set", name, value]:
            assistant.change_settings(assistant.settings.updated(name, value))
        case ["adapter"]:
            names = ", ".join(adapter_names(assistant.model))
            print(names or "no adapter is loaded; start with --adapter DIRECTORY")
        case ["adapter", name]:
            assistant.switch_adapter(name)
        case ["base"]:
            assistant.switch_adapter(None)
        case _ if command in COMMANDS:
            raise UserError(f"/{command} takes other arguments; see /help")
        case _:
            raise UserError(f"/{command} is not a command{suggestion(command, COMMANDS)}")


if __name__ == "__main__":
    run_script(main)
