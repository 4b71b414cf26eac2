"""From the settings of a run to its examples: read, mixed, split, tokenized and checked.

Trainer, evaluation and preparation get their examples here, so they cannot see a row in different ways.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from minilora.config import ModelConfig
from minilora.data.chat import ChatTemplate
from minilora.data.examples import Dataset, split, tokenize
from minilora.data.prepared import load_tokens, tokens_file, tokens_key
from minilora.data.rows import Row, mix_rows, parse_datasets, read_rows
from minilora.data.tokenizer import Tokenizer
from minilora.run.settings import TrainConfig
from minilora.system.assets import ASSETS
from minilora.system.errors import UserError, raise_error

Places = (
    str | Sequence[str]
)  # one or several datasets, perhaps with weights: the keys dataset and eval_dataset


def load_datasets(
    config: TrainConfig, model_config: ModelConfig, tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[Dataset, Dataset | None]:
    """Training and held-out examples of a run. Raises UserError for whatever is wrong with them."""
    settings = token_settings(config, model_config)
    rows, held_out = read_datasets(config)
    train_set = tokenize_rows(rows, config.dataset, settings, model_config, tokenizer, template)
    if not held_out:
        return train_set, None
    return train_set, tokenize_rows(
        held_out, config.eval_dataset or config.dataset, settings, model_config, tokenizer, template
    )


def read_datasets(
    config: TrainConfig, on_error: Callable[[UserError], None] = raise_error
) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out, mixed by weights and split as the settings say."""
    if config.dataset is None:
        raise UserError("dataset is missing; name a file, an address or a dataset of the hub with --dataset")
    rows = read_mixed(config.dataset, config, on_error)
    if config.eval_dataset:
        return rows, read_mixed(config.eval_dataset, config, on_error)
    return split(rows, config.val_size, config.seed) if config.val_size else (rows, [])


def read_mixed(
    places: Places, config: TrainConfig, on_error: Callable[[UserError], None] = raise_error
) -> list[Row]:
    """The rows of one or several datasets."""
    parts, weights = [], []
    for place, weight in parse_datasets(places):
        if place.startswith("assets/") and not Path(place).exists():
            place = str(
                ASSETS.parent / place
            )  # the examples that come with minilora are found from every working directory
        columns = config.prompt_column, config.completion_column, config.messages_column
        rows = read_rows(place, *columns, chat=config.template is not None, on_error=on_error)
        parts.append(rows[: config.max_samples])
        weights.append(weight)
    return mix_rows(parts, weights, config.seed)


def tokenize_rows(
    rows: list[Row],
    places: Places,
    settings: dict[str, object],
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    on_error: Callable[[UserError], None] = raise_error,
) -> Dataset:
    """The rows of `places` as examples, encoded as `token_settings` say; or from tokens that lie ready.

    Raises UserError if nothing to learn is left, and for a tokenizer that is of another model.
    """
    dataset = None
    if isinstance(places, str) and (path := tokens_file(places)).is_file():
        dataset = load_tokens(path, rows, tokens_key(rows, tokenizer, template, settings))
        print(
            f"tokens     {f'lie ready in {path}' if dataset else f'of {path} are of other rows or settings, and left alone'}"
        )
    dataset = dataset or tokenize(rows, tokenizer, template=template, on_error=on_error, **settings)
    if not dataset.examples and dataset.dropped:
        raise UserError(
            f"{places}: no token to learn is left in any of its {len(rows)} examples; raise cutoff_len = {settings['cutoff_len']}"
        )
    if (
        largest := max((int(e.input_ids.max()) for e in dataset.examples), default=0)
    ) >= model_config.vocab_size:
        raise UserError(
            f"the tokenizer gives token {largest}, the model knows {model_config.vocab_size}: they are not of one model"
        )
    return dataset


def token_settings(config: TrainConfig, model_config: ModelConfig) -> dict[str, object]:
    """What of a run's settings `minilora.data.examples.tokenize` takes. Raises UserError for rows that are
    longer than the model reads.
    """
    limit = model_config.max_position_embeddings
    cutoff_len = config.cutoff_len or min(1024, limit)
    if cutoff_len > limit:
        raise UserError(
            f"cutoff_len = {cutoff_len} is more than the {limit} positions of the model; set --cutoff_len {limit}"
        )
    return dict(
        cutoff_len=cutoff_len, train_on_prompt=config.train_on_prompt, mask_history=config.mask_history
    )
