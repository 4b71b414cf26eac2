"""The linter's advice is a command, and the command runs."""

import shutil
import warnings

import pytest
from support.adapter_kinds import KINDS, peft_model

from minilora.adapters.findings import SAVE_AGAIN, UNMERGED
from minilora.adapters.lint import lint_adapter, loads
from minilora.formats.weights import read_config

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::UserWarning:transformers")


@pytest.mark.parametrize("name", KINDS)
def test_every_command_that_is_advised_for_any_kind_of_adapter_runs(name, call, tmp_path, model_dir):
    kind = KINDS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model(kind, tmp_path / "base").save_pretrained(tmp_path / "adapter", **kind.saving)
    shutil.copy(model_dir / "tokenizer.model", tmp_path / "base")
    without_base = lint_adapter(tmp_path / "adapter")
    findings = lint_adapter(tmp_path / "adapter", read_config(tmp_path / "base"))
    assert all(finding.mend for finding in findings + without_base)
    commands = {f.mend for f in findings + without_base if f.mend.startswith("python ")}
    assert ("lora_bias" in name) == (UNMERGED in {f.mend for f in findings}), "the base has no place for it"
    for i, command in enumerate(sorted(commands)):
        _, script, *arguments = command.split()
        new = tmp_path / f"new {i}"
        code, _, err = call(
            script.removeprefix("scripts/").removesuffix(".py"),
            *[new if argument == "NEW" else argument for argument in arguments],
        )
        assert code == 0, err
        if "--export_adapter" in command:
            left = [f for f in lint_adapter(new) if "is adapted without" not in f.why]  # SGLang, of q alone
            assert loads(left)


def test_an_adapter_that_merge_refuses_is_not_sent_there(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model(KINDS["dora"], tmp_path / "base").save_pretrained(tmp_path / "adapter")
    findings = lint_adapter(tmp_path / "adapter")
    assert findings and all("merge.py" in finding.mend for finding in findings)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 4', '"r": 5'))
    findings = lint_adapter(tmp_path / "adapter")
    assert {finding.mend for finding in findings} <= {SAVE_AGAIN, "", "correct adapter_config.json"}


def test_the_base_model_is_to_be_named_where_the_adapter_names_none(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model(KINDS["dora"], tmp_path / "base").save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace(f'"{tmp_path / "base"}"', "null"))
    assert all(finding.mend.endswith(" --model BASE") for finding in lint_adapter(tmp_path / "adapter"))
