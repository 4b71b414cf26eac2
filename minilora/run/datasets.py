"""Read, mix, split, tokenize and check the examples that a run's settings name.

Training, evaluation and preparation all get their examples here, so they see every row in the same way.
"""

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from minilora.config import ModelConfig
from minilora.data.chat import TOKENIZER_TEMPLATE, ChatTemplate, load_chat_template, training_clock
from minilora.data.examples import Dataset, split, tokenize
from minilora.data.file_formats import list_columns
from minilora.data.mixing import mix_rows, parse_datasets
from minilora.data.prepared import load_tokens, tokens_file, tokens_key
from minilora.data.rows import ColumnNames, Row, files_of, parse_columns, read_rows
from minilora.data.tokenizer import Tokenizer
from minilora.rope import context_length
from minilora.run.settings import TrainConfig
from minilora.system.assets import ASSETS
from minilora.system.errors import UserError, raise_error
from minilora.system.terminal import visible

_CHECKED = 8  # rows whose prompts are compared with those of generation
Sources = str | Sequence[str]  # a value of the keys dataset and eval_dataset: names, perhaps with weights


def load_datasets(
    config: TrainConfig, model_config: ModelConfig, tokenizer: Tokenizer
) -> tuple[ChatTemplate | None, Dataset, Dataset | None]:
    """Return the template of a run, its training examples, and the held-out ones or None.

    Raises UserError for bad data.
    """
    rows, held_out = read_datasets(config)
    template = choose_template(config.template, tokenizer, rows)
    encoding = token_settings(config, model_config), model_config, tokenizer, template
    train_set = tokenize_rows(rows, config.dataset, *encoding)
    for line in template_warnings(train_set, tokenizer, template, config.mask_history):
        print(line)
    if not held_out:
        return template, train_set, None
    return template, train_set, tokenize_rows(held_out, config.eval_dataset or config.dataset, *encoding)


def choose_template(
    name: str | None,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    now: Callable[[], datetime] = training_clock,
) -> ChatTemplate | None:
    """Return the template that words all rows with a prompt: in training, evaluation and chat the same.

    It is the one of this name, or else the tokenizer's own, or else `alpaca` for rows of Alpaca's form, or
    else none: prompts are used as they are written. Plain text needs none.
    """
    if name is None and rows and all(row.prompt is None for row in rows):
        return None
    template = load_chat_template(name, tokenizer, now)
    if template is None and any(row.is_instruction for row in rows):
        return load_chat_template("alpaca", tokenizer, now)
    return template


def describe_template(template: ChatTemplate | None, tokenizer: Tokenizer, rows: Sequence[Row]) -> str:
    """Return in words which template words the rows of a run."""
    if template is None:
        return "none (plain text)" if all(row.prompt is None for row in rows) else "none (raw text)"
    if template.name == TOKENIZER_TEMPLATE:
        return "the tokenizer's own"
    if tokenizer.chat_template in (None, template.source):
        return template.name
    return f"{template.name}, saved with the adapter; the model has one of its own: --template tokenizer"


def template_warnings(
    dataset: Dataset, tokenizer: Tokenizer, template: ChatTemplate | None, mask_history: bool
) -> Iterator[str]:
    """Yield what a template does to the rows of a dataset that nobody would expect, a line each."""
    conversations = [row for row in dataset.rows if row.prompt is not None][:_CHECKED]
    if template is not None and conversations:
        mismatches = [template.prompt_mismatch(row.conversation) for row in conversations]
        if all(mismatches):
            asked, trained = mismatches[0]
            deepseek = tokenizer.token_id("<｜Assistant｜>") is not None
            named = "deepseek3 (without thoughts) or deepseekr1" if deepseek else "one without that mark"
            yield (
                f"warning: in use, the chat template {template.name} asks for an answer with {asked!r}; the "
                f"rows to train have {trained!r} there, so the answers will not be those that were trained; "
                f"choose another template: {named}, with --template"
            )
    if dataset.lost_thoughts and template is not None:
        qwen = template.name == "qwen3" or tokenizer.token_id("<|im_start|>") is not None
        every = "; or learn all thoughts, with --template qwen3_all" if qwen else ""
        learned = "and those answers are learned without them: " if not mask_history else "as in use"
        last = "learn only the last answers, with --mask_history" if not mask_history else ""
        yield (
            f"warning: the chat template {template.name} leaves out the thoughts of "
            f"{dataset.lost_thoughts:,} answers, {learned}{last}{every}"
        )


def read_datasets(
    config: TrainConfig, on_error: Callable[[UserError], None] = raise_error
) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and those held out, after mixing by weight and splitting."""
    if config.dataset is None:
        raise UserError("dataset is missing; name a file, an address or a dataset on the hub with --dataset")
    rows = read_mixed(config.dataset, config, on_error)
    if config.eval_dataset:
        return rows, read_mixed(config.eval_dataset, config, on_error)
    return split(rows, config.val_size, config.seed) if config.val_size else (rows, [])


def dataset_names(config: TrainConfig) -> list[str]:
    """Return the files, addresses and hub ids in the keys dataset and eval_dataset, without their weights."""
    given = [sources for sources in (config.dataset, config.eval_dataset) if sources is not None]
    return [name for sources in given for name, _ in parse_datasets(sources)]


def read_mixed(
    sources: Sources, config: TrainConfig, on_error: Callable[[UserError], None] = raise_error
) -> list[Row]:
    """Return the rows of one or several datasets, mixed by their weights."""
    named = config.prompt_column, config.completion_column, config.messages_column, config.text_column
    names = ColumnNames(*named, parse_columns(config.columns))
    parts, weights = [], []
    for source, weight in parse_datasets(sources):
        if source.startswith("assets/") and not Path(source).exists():
            source = str(ASSETS.parent / source)  # minilora's own examples, from any working directory
        unread: dict[str, int] = {}
        rows = read_rows(source, names, on_error, unread)
        if (files := files_of(rows)) != [source]:
            print(visible(f"files      {source}: {list_columns(files)}"))
        if unread:
            print(visible(f"columns    {source}: not read: {list_columns(sorted(unread))}"))
        parts.append(rows[: config.max_samples])
        weights.append(weight)
    return mix_rows(parts, weights, config.seed)


def tokenize_rows(
    rows: list[Row],
    sources: Sources,
    settings: dict[str, object],
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    on_error: Callable[[UserError], None] = raise_error,
) -> Dataset:
    """Encode the rows of `sources` with `token_settings`, or load the tokens that scripts/prepare.py saved.

    Raises UserError if no learned token is left, or if the tokenizer belongs to another model.
    """
    dataset = None
    if isinstance(sources, str) and (path := tokens_file(sources)).is_file():
        key = tokens_key(rows, tokenizer, template, settings)
        dataset = load_tokens(path, rows, key, settings["cutoff_len"])
        ignored = f"of {path} are of other rows or settings, and ignored"
        print(f"tokens     {f'lie ready in {path}' if dataset else ignored}")
    dataset = dataset or tokenize(rows, tokenizer, template=template, on_error=on_error, **settings)
    if not dataset.examples and dataset.dropped:
        raise UserError(
            f"{sources}: no token to learn is left in any of its {len(rows)} examples; "
            f"raise cutoff_len = {settings['cutoff_len']}"
        )
    largest = max((int(example.input_ids.max()) for example in dataset.examples), default=0)
    if largest >= model_config.vocab_size:
        raise UserError(
            f"the tokenizer gives token {largest}, but the model has {model_config.vocab_size} tokens: "
            "they do not belong to one model; or its tokens were added later: set resize_vocab to true"
        )
    return dataset


def token_settings(config: TrainConfig, model_config: ModelConfig) -> dict[str, object]:
    """Return the settings for `tokenize`. Raises UserError if cutoff_len exceeds the model's positions."""
    limit = context_length(model_config)
    cutoff_len = config.cutoff_len or min(1024, limit)
    if cutoff_len > limit:
        raise UserError(
            f"cutoff_len = {cutoff_len} is more than the {limit} positions of the model; "
            f"set --cutoff_len {limit}"
        )
    return dict(
        cutoff_len=cutoff_len,
        train_on_prompt=config.train_on_prompt,
        mask_history=config.mask_history,
        truncation=config.truncation,
    )
