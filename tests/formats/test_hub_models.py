"""The config.json of well-known repositories: read as transformers reads it, or refused for the right reason."""

import json

import pytest
import torch
from support.hub_models import PAGE, REPOSITORIES, page

from minilora import CausalLM, UserError
from minilora.formats.config_json import parse_config, to_config_json

READ = [name for name, repository in REPOSITORIES.items() if not repository.refused or repository.accept]


def ours(name: str):
    repository = REPOSITORIES[name]
    return parse_config(json.loads(json.dumps(repository.fields)), repository.accept)


def windows(theirs) -> tuple[int | None, ...]:
    """The window of every layer, as transformers' models choose their masks."""
    if theirs.model_type == "llama":
        return (None,) * theirs.num_hidden_layers
    if theirs.model_type == "mistral":
        return (theirs.sliding_window,) * theirs.num_hidden_layers
    return tuple(
        theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types
    )


def tokens(value: int | list[int] | None) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


@pytest.mark.parametrize("name", READ)
def test_an_accepted_file_means_what_it_means_in_transformers(name):
    import transformers

    fields = dict(REPOSITORIES[name].fields)
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(fields)))
    config = ours(name)
    for field in (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id pad_token_id"
    ).split():
        assert getattr(config, field) == getattr(theirs, field), field
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert config.head_dim == head_dim and config.layer_windows == windows(theirs)
    assert config.eos_token_ids == tokens(theirs.eos_token_id)
    rope = theirs.rope_parameters
    assert (config.rope.theta, config.rope.rope_type) == (rope["rope_theta"], rope["rope_type"])
    for field in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        assert field not in rope or getattr(config.rope, field) == rope[field], field
    assert str(theirs.dtype or torch.float32) == f"torch.{config.dtype}"


@pytest.mark.parametrize("name", [name for name in READ if REPOSITORIES[name].parameters])
def test_the_model_has_the_number_of_parameters_that_the_hub_shows(name):
    with torch.device("meta"):
        model = CausalLM(ours(name))
    assert sum(p.numel() for p in model.parameters()) == REPOSITORIES[name].parameters


@pytest.mark.parametrize("name", READ)
def test_written_and_read_again_it_is_the_same_model(name):
    assert parse_config(to_config_json(ours(name))) == ours(name)


@pytest.mark.parametrize("name", [name for name in REPOSITORIES if REPOSITORIES[name].refused])
def test_a_refused_file_is_refused_for_its_reason_in_one_line(name):
    with pytest.raises(UserError) as error:
        parse_config(json.loads(json.dumps(REPOSITORIES[name].fields)))
    assert REPOSITORIES[name].refused in str(error.value) and "\n" not in str(error.value)


def test_the_page_is_up_to_date_and_names_more_than_fifty():
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "run python -m support.hub_models with tests/ on PYTHONPATH"
    )
    assert len(READ) >= 50
