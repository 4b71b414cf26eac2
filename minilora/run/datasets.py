"""Read, mix, split, tokenize and check the examples that a run's settings name.

Training, evaluation and preparation all get their examples here, so they see every row in the same way.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from minilora.config import ModelConfig
from minilora.data.chat import ChatTemplate
from minilora.data.examples import Dataset, split, tokenize
from minilora.data.prepared import load_tokens, tokens_file, tokens_key
from minilora.data.rows import Row, mix_rows, parse_datasets, read_rows
from minilora.data.tokenizer import Tokenizer
from minilora.rope import context_length
from minilora.run.settings import TrainConfig
from minilora.system.assets import ASSETS
from minilora.system.errors import UserError, raise_error

Sources = str | Sequence[str]  # a value of the keys dataset and eval_dataset: names, perhaps with weights


def load_datasets(
    config: TrainConfig, model_config: ModelConfig, tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[Dataset, Dataset | None]:
    """Return the training examples of a run, and the held-out ones or None. Raises UserError for bad data."""
    encoding = token_settings(config, model_config), model_config, tokenizer, template
    rows, held_out = read_datasets(config)
    train_set = tokenize_rows(rows, config.dataset, *encoding)
    if not held_out:
        return train_set, None
    return train_set, tokenize_rows(held_out, config.eval_dataset or config.dataset, *encoding)


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
    columns = config.prompt_column, config.completion_column, config.messages_column
    parts, weights = [], []
    for source, weight in parse_datasets(sources):
        if source.startswith("assets/") and not Path(source).exists():
            source = str(ASSETS.parent / source)  # minilora's own examples, from any working directory
        rows = read_rows(source, *columns, chat=config.template is not None, on_error=on_error)
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
        cutoff_len=cutoff_len, train_on_prompt=config.train_on_prompt, mask_history=config.mask_history
    )
