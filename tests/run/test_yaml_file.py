"""A YAML file of settings is read in seconds, or refused in one line that names it."""

import os
import re
import socket
import time

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from minilora import UserError
from minilora.run.settings import load_train_config
from minilora.run.yaml_file import read_yaml

LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("x" * 100_001, "is larger than 100,000 bytes"),
        ("\n" * 100_001, "is larger than 100,000 bytes"),
        (LAUGHS, "holds more than 100,000 values, with its aliases written out"),
        (MERGES, "levels deep"),
        (CHAIN, "is nested more than 20 levels deep"),
        ("a: &a [*a]", "is nested more than 20 levels deep"),
        ("a: &a {b: *a}", "is nested more than 20 levels deep"),
        ("a: " + "[" * 25 + "]" * 25, "is nested more than 20 levels deep"),
        ("a: " + "[" * 50_000, "is not valid YAML: it is nested too deeply"),
        ("seed: " + "1:59" * 20_000, "holds a text of more than 10,000 characters"),
        ("seed: !!python/object/apply:os.system ['echo no']", "could not determine a constructor"),
        ("seed: !!bool maybe", "is not valid YAML: 'maybe'"),
        ("seed: !!int ''", "is not valid YAML"),
        ("seed: !!float x", "is not valid YAML"),
        ("seed: !!timestamp x", "is not valid YAML"),
        ("seed: !!binary aGk=", "holds a bytes at 'seed', which no setting is"),
        ("seed: !!set {a, b}", "holds a set at 'seed'"),
        ("seed: [!!omap [a: 1]]", "holds a tuple at 'seed'"),
        ("!!set {a, b}", "must hold `key: value` lines"),
        ("seed: 0x" + "f" * 5000, "holds a number of too many digits at 'seed'"),
        ("seed: " + "1" + ":59" * 3000, "holds a number of too many digits at 'seed'"),
        ("seed: 1" + ":59" * 3000 + ".5", "is not valid YAML"),
        ("seed: 2024-02-30", "is not valid YAML: day is out of range"),
        ("? [a]\n: 1", "is not valid YAML"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: *b", "found undefined alias"),
        ("sweep: {lora-rank: [1], lora_rank: [2]}", "sets lora_rank twice"),
        ('dataset: "a\\0b"', "holds a character that cannot be printed at 'dataset'"),
        ('dataset: ["\\ud800"]', "holds a character that cannot be printed at 'dataset'"),
        ('"a\\e": 1', "holds a character that cannot be printed"),
        ("a\0: 1", "is not valid YAML: unacceptable character"),
        (b"a: \xff", "is not valid YAML: 'utf-8' codec can't decode"),
        ("a: 1".encode("utf-16"), "is not valid YAML: 'utf-8' codec can't decode"),
        ("a: !" + "x" * 9000, "is not valid YAML"),
        ("", "must hold `key: value` lines"),
        ("text", "must hold `key: value` lines"),
    ],
)
def test_a_file_that_is_too_much_or_not_plain_is_one_short_line(tmp_path, content, said):
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=re.escape(said)) as error:
        read_yaml(path)
    assert str(error.value).startswith(f"config {path} ") and len(str(error.value)) < 450 + len(str(path))


def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as bound:
        monkeypatch.chdir(tmp_path)
        bound.bind("socket.yaml")
        for name in ("fifo", "folder", "zero", "socket"):
            with pytest.raises(UserError, match=f"config .*{name}.yaml is no file"):
                read_yaml(tmp_path / f"{name}.yaml")
    (tmp_path / "gone.yaml").symlink_to("nowhere")
    for name in ("gone.yaml", "nowhere.yaml", "x" * 5000, "a\0b"):
        with pytest.raises(UserError, match="does not exist"):
            read_yaml(tmp_path / name)


def test_aliases_merges_dates_and_a_byte_order_mark_are_read_as_pyyaml_reads_them(tmp_path):
    text = "\ufeffbase: &b {r: 1, lora-alpha: 2}\nmine:\n  <<: *b\n  r: 3\nday: 2024-01-02\nsame: *b\nlist: [1, 1.5, no, ~]\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    assert read_yaml(tmp_path / "a.yaml") == yaml.safe_load(text)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@given(st.dictionaries(st.text("ab_", min_size=1), plain, min_size=1))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_plain_values_come_back_and_others_are_refused(tmp_path, values):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    try:
        assert read_yaml(tmp_path / "a.yaml") == values
    except UserError as error:
        assert "printed" in str(error) and UNPRINTABLE.search(str(strings(values))) or "twice" in str(error)


def strings(value: object) -> str:
    if isinstance(value, dict):
        return "".join(strings(part) for pair in value.items() for part in pair)
    return (
        "".join(map(strings, value)) if isinstance(value, list) else value if isinstance(value, str) else ""
    )


words = st.sampled_from(
    "a b - : ? & * ! !! | > ' \" % @ ` , [ ] { } # << &a *a !!set !!int !!binary !!omap !!timestamp --- ... 1 .nan .inf "
    "0x 1:59 2024-01-02 ~ true lora_rank seed dataset sweep".split()
) | st.text(max_size=3)


@given(st.lists(st.tuples(words, st.sampled_from(["", " ", "\n", "\n  "])), max_size=25))
@example([("seed", ""), (":", " "), ("!!bool", " "), ("b", "")])
@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_a_run_or_one_line(tmp_path, parts):
    (tmp_path / "a.yaml").write_bytes("".join(map("".join, parts)).encode("utf-8", "surrogatepass"))
    try:
        load_train_config(["--config", str(tmp_path / "a.yaml")])
    except UserError as error:
        assert "\n" not in str(error)


def test_the_largest_file_is_read_in_seconds(tmp_path):
    text = "a: [" + "1, " * 33_000 + "1]\n"
    (tmp_path / "a.yaml").write_text(text)
    began = time.process_time()
    assert len(read_yaml(tmp_path / "a.yaml")["a"]) == 33_001
    assert time.process_time() - began < 30
