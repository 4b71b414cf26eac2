"""A field of config.json that nobody knows: refused with the mend, accepted by name, and recorded."""

import json

import pytest
import yaml
from support.merging import make_adapter, make_base

FIELD = "flavour"


@pytest.fixture
def strange(tmp_path, model_dir):
    """A base whose `config.json` holds an unknown field, and an adapter that was made before it did."""
    make_base(tmp_path / "base", model_dir)
    make_adapter(tmp_path / "base", tmp_path / "adapter")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {FIELD: "vanilla"}))
    return tmp_path


def test_a_run_with_the_key_trains_and_says_so_in_its_settings_and_its_card(strange, train):
    _, err = train("refused", code=2, model=strange / "base")
    assert err.count("\n") == 1 and "unknown field flavour" in err and "accept_config_fields" in err
    directory, _ = train(model=strange / "base", accept_config_fields=FIELD)
    assert yaml.safe_load((directory / "training_config.yaml").read_text())["accept_config_fields"] == FIELD
    assert "| fields of config.json declared harmless | flavour |" in (directory / "README.md").read_text()


def test_evaluation_and_chat_and_merge_take_the_key_from_the_run_or_from_the_command_line(
    strange, train, call, dataset
):
    evaluate = ("evaluate", "--adapter", strange / "adapter", "--dataset", dataset)
    code, _, err = call(*evaluate)
    assert code == 2 and "unknown field flavour" in err
    assert call(*evaluate, "--accept_config_fields", FIELD)[0] == 0
    merge = ("merge", "--adapter", strange / "adapter", "--output")
    code, _, err = call(*merge, strange / "refused")
    assert code == 2 and "unknown field flavour" in err and not (strange / "refused").exists()
    assert call(*merge, strange / "merged", "--accept_config_fields", FIELD)[0] == 0

    run, _ = train(model=strange / "base", accept_config_fields=FIELD)
    assert call("evaluate", "--adapter", run, "--dataset", dataset)[0] == 0
    assert call("chat", "--adapter", run, "--max_new_tokens", "2", typed="say\n")[0] == 0
    assert call("merge", "--adapter", run, "--output", strange / "of-the-run")[0] == 0
    merged = json.loads((strange / "of-the-run" / "config.json").read_text())
    assert merged[FIELD] == "vanilla", "the base's own field stays, for programs that know it"
