"""scripts/compare.py: several runs in one table, one picture and one page."""

import json
from functools import partial

import compare
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture
def run(call, tmp_path, monkeypatch):
    """Run `compare.py ARGUMENTS` in tmp_path: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return partial(call, "compare")


def record(step, loss, **more):
    return (
        dict(step=step, loss=loss, tokens_per_second=1000.0 * step, memory=step * 2**30, seconds=50.0 * step)
        | more
    )


@pytest.fixture
def make_run(tmp_path):
    def make(name, records, **settings):
        directory = tmp_path / name
        directory.mkdir(parents=True)
        (directory / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in records))
        (directory / "training_config.yaml").write_text(
            yaml.safe_dump({"output_dir": str(directory)} | settings)
        )
        return directory

    return make


def test_the_table_has_each_runs_figures_and_the_settings_that_differ(run, make_run, tmp_path):
    held_out = [{"step": 0, "eval_loss": 4.0}, {"step": 2, "eval_loss": 0.5}, {"step": 3, "eval_loss": 0.75}]
    make_run(
        "a",
        [held_out[0], record(1, 3.0), record(2, 2.0), *held_out[1:], record(3, 1.0)],
        lora_rank=8,
        seed=1,
        lora_target="all",
        save_steps=9,
    )
    make_run("b", [record(1, 2.5)], lora_rank=None, seed=1, lora_target=["q_proj", "v_proj"], lora_alpha=3)
    code, out, err = run("a", "b")
    assert code == 0, err
    first, a, b, _, last = out.splitlines()
    assert " ".join(first.split()) == (
        "run steps final loss held-out at step tokens/s memory time lora_target lora_alpha"
    )
    assert a.split() == "a 3 1.0000 0.5000 2 2.0k 3.00 GiB 2:30 all 16".split()
    assert b.split() == "b 1 2.5000 - - 1.0k 1.00 GiB 0:50 q_proj,v_proj 3".split()
    assert len(first) == len(a) == len(b)  # the columns are flush right
    assert last == "picture: compare.png" and (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_the_same_name_are_told_apart_by_their_parents(run, make_run):
    for name in ("x/out", "y/out", "z"):
        make_run(name, [record(1, 1.0)])
    code, out, _ = run("x/out", "y/out", "--output", "two.png")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:3]] == ["x/out", "y/out"]
    code, out, _ = run("x/out", "z", "z/../z", "--output", "two.png")
    assert (
        code == 0
        and [line.split()[0] for line in out.splitlines()[1:3]] == ["out", "z"]
        and out.splitlines()[3] == ""
    )


def test_a_run_with_a_torn_last_line_or_without_settings_is_compared(run, make_run):
    directory = make_run("a", [record(1, 1.0), record(2, 0.5)])
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    (directory / "training_config.yaml").unlink()
    code, out, err = run("a")
    assert code == 0 and out.splitlines()[1].split()[:3] == ["a", "2", "0.5000"], err


def broken(name, text):
    return lambda directory: (directory / name).write_text(text)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (broken("metrics.jsonl", ""), "recorded nothing yet"),
        (
            broken("metrics.jsonl", '{"step": 1}\n{"step": \n{"step": 3}\n'),
            "metrics.jsonl, line 2 is not valid JSON",
        ),
        (broken("metrics.jsonl", '{"step": 1}\n[1]\n'), "metrics.jsonl, line 2 is not a record"),
        (broken("metrics.jsonl", '{"loss": 1}\n'), "metrics.jsonl, line 1 is not a record"),
        (broken("metrics.jsonl", '{"step": 1, "loss": "low"}\n'), "metrics.jsonl, line 1 is not a record"),
        (
            lambda directory: (directory / "metrics.jsonl").write_bytes(b"\xff\xfe\n"),
            "line 1 is not valid JSON",
        ),
        (broken("training_config.yaml", "a: [1"), "training_config.yaml is not valid YAML"),
        (broken("training_config.yaml", "- 1"), "training_config.yaml must hold"),
    ],
)
def test_a_directory_without_a_readable_run_is_one_line_and_exit_2(run, make_run, tmp_path, spoil, said):
    make_run("good", [record(1, 1.0)])
    spoil(make_run("bad", [record(1, 1.0)]))
    code, out, err = run("good", "bad")
    assert code == 2 and said in err and "bad" in err and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "compare.png").exists()


def test_a_path_that_is_no_directory_is_one_line_and_exit_2(run, make_run):
    make_run("good", [record(1, 1.0)])
    for arguments, said in (
        (["good", "nowhere"], "nowhere does not exist"),
        (["good", "--output", "no/a.png"], "no (No such file or directory)"),
        (["good", "--output", "good"], "--output good exists and is no file"),
        (["good", "--html", "no/a.html"], "no (No such file or directory)"),
        (["good", "--html", "good"], "--html good exists and is no file"),
        (["good", "--html", "good/metrics.jsonl"], "pages are HTML files"),
    ):
        code, out, err = run(*arguments)
        assert code == 2 and said in err and err.count("\n") == 1 and out == ""


def test_other_files_are_skipped_with_a_note_unless_no_run_is_named(run, make_run, tmp_path):
    make_run("runs/a", [record(1, 1.0)])
    (tmp_path / "runs" / "compare.png").touch()
    (tmp_path / "runs" / "logs").mkdir()
    others = ["runs/compare.png", "runs/logs"]
    code, out, err = run("runs/a", *others)
    assert code == 0 and [line.split()[0] for line in out.splitlines()[:2]] == ["run", "a"]
    assert err == "".join(f"note: {name} is skipped: it has no metrics.jsonl\n" for name in others)
    code, out, err = run(*others)
    assert code == 2 and out == "" and "there is no training run" in err.splitlines()[-1]


def test_nan_and_infinite_values_are_left_out_of_table_and_picture(run, make_run):
    nan, inf = float("nan"), float("inf")
    make_run(
        "a",
        [
            record(1, 3.0),
            record(2, nan, eval_loss=inf),
            record(3, inf),
            record(4, 2.0, eval_loss=5.0),
            record(5, nan),
        ],
    )
    code, out, err = run("a", "--output", "a.png")
    assert code == 0, err
    assert out.splitlines()[1].split()[:5] == "a 5 2.0000 5.0000 4".split()


SETTINGS = st.dictionaries(
    st.sampled_from("abcd"), st.none() | st.integers(0, 2) | st.sampled_from(["x", [1, 2]])
)


@given(st.lists(SETTINGS, min_size=1, max_size=4))
def test_a_setting_is_shown_exactly_if_two_runs_disagree_on_it(settings):
    runs = {str(i): compare.Run([{"step": 1}], each) for i, each in enumerate(settings)}
    for name in "abcd":
        disagree = any(one.get(name) != other.get(name) for one in settings for other in settings)
        (shown,) = [line["differs"] for line in compare.all_settings(runs) if line["name"] == name] or [False]
        assert shown == disagree


def test_a_secret_in_the_settings_of_a_run_is_not_shown(run, make_run):
    for name in "ab":
        make_run(
            name,
            [record(1, 1.0)],
            dataset=f"https://me:QQSECRETQQ@host/{name}.jsonl",
            eval_dataset=[f"s3://QQSECRETQQ@{name}"],
        )
    code, out, err = run("a", "b")
    assert code == 0 and "https://host/a.jsonl" in out and "s3://b" in out and "QQSECRETQQ" not in out + err


# ---- settings that are left to a preset ----


def used(directory):
    """The adapter's settings that are shown of a run."""
    settings = compare.read_run(directory).settings
    return {name: settings.get(name) for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target")}


def saved_adapter(directory, **values):
    """Put an adapter_config.json into a directory, as PEFT writes it."""
    config = dict(peft_type="LORA", r=4, lora_alpha=12, lora_dropout=0.1, target_modules=["v_proj", "q_proj"])
    (directory / "adapter_config.json").write_text(json.dumps(config | values))


STANDARD = dict(
    lora_rank=8, lora_alpha=16, lora_dropout=0.05, lora_target=["k_proj", "o_proj", "q_proj", "v_proj"]
)
NONE = dict.fromkeys(STANDARD)


@pytest.mark.parametrize(
    "settings, shown",
    [
        (NONE, STANDARD),
        (NONE | {"lora_rank": 2}, STANDARD | {"lora_rank": 2, "lora_alpha": 4}),
        (
            NONE | {"preset": "minimal_r4_qv", "lora_target": "v_proj"},
            dict(lora_rank=4, lora_alpha=8, lora_dropout=0.05, lora_target="v_proj"),
        ),
        (NONE | {"use_vera": True}, STANDARD | {"lora_rank": 256, "lora_alpha": None}),
        (NONE | {"adapter_name_or_path": "there"}, NONE),
        (NONE | {"a_key_of_another_version": 1}, NONE),
        (NONE | {"preset": "gone"}, NONE),
    ],
    ids=[
        "standard",
        "a rank",
        "another preset",
        "VeRA",
        "an older adapter",
        "another version",
        "an old preset",
    ],
)
def test_settings_left_to_a_preset_are_shown_as_the_run_used_them(make_run, settings, shown):
    assert used(make_run("a", [record(1, 1.0)], **settings)) == shown


def test_the_saved_adapter_knows_best_what_a_preset_or_an_older_adapter_gave(make_run):
    for name, settings in (("a", NONE), ("b", NONE | {"adapter_name_or_path": "there"}), ("c", {})):
        directory = make_run(name, [record(1, 1.0)], **settings)
        saved_adapter(directory)
        assert used(directory) == dict(
            lora_rank=4, lora_alpha=12, lora_dropout=0.1, lora_target=["q_proj", "v_proj"]
        )
    directory = make_run("d", [record(1, 1.0)], **NONE, init_lora_weights="pissa")
    saved_adapter(directory, r=16, lora_alpha=32)  # as plain LoRA of twice the rank
    assert used(directory) == STANDARD


def test_a_real_run_shows_the_values_of_its_preset(train):
    directory, _ = train(preset="minimal_r4_qv", lora_dropout=None)
    shown = used(directory)
    assert shown == dict(lora_rank=4, lora_alpha=8, lora_dropout=0.05, lora_target=["q_proj", "v_proj"])
    (directory / "adapter_config.json").unlink()
    assert used(directory) == shown


def test_a_broken_adapter_config_is_one_line_and_exit_2(run, make_run):
    saved_adapter(make_run("a", [record(1, 1.0)]), r="many")
    code, out, err = run("a")
    assert code == 2 and "adapter_config.json: r must be" in err and err.count("\n") == 1 and out == ""


# ---- answers and the page ----


def answered(directory, *pairs):
    """Put answers into a directory: (expected, adapted)."""
    lines = [dict(prompt=f"ask {i}", expected=e, base="?", adapted=a) for i, (e, a) in enumerate(pairs)]
    (directory / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def test_the_table_has_the_share_of_exact_answers_if_a_run_answers(run, make_run):
    answered(make_run("a", [record(1, 1.0)]), ("x", "x"), ("y", "z"), ("", ""))
    make_run("b", [record(1, 1.0)])
    code, out, err = run("a", "b")
    assert code == 0 and out.splitlines()[0].split()[-1] == "exact", err
    assert [line.split()[-1] for line in out.splitlines()[1:3]] == ["66.7%", "-"]
    code, out, _ = run("b")
    assert "exact" not in out


def test_the_page_holds_what_the_table_shows_and_no_secret(run, make_run, tmp_path):
    secret = "https://me:QQSECRETQQ@host/a.jsonl?sig=QQSECRETQQ"
    a = make_run("a", [record(1, 3.0), record(2, 2.0)], dataset=secret, seed=1)
    make_run("b", [record(1, 2.5)], dataset="b.jsonl", seed=1)
    lines = answered(a, ("x", "x"))
    code, out, err = run("a", "b", "--html", "page.html")
    assert code == 0 and out.splitlines()[-1] == "page: page.html", err
    page = (tmp_path / "page.html").read_text()
    assert "QQSECRETQQ" not in page
    content = json.loads(page.partition('id="content">')[2].partition("</script>")[0])
    assert content["names"] == ["a", "b"]
    assert [curves["loss"] for curves in content["curves"]] == [[[1, 3.0], [2, 2.0]], [[1, 2.5]]]
    for row, line in zip([content["headings"], *content["figures"]], out.splitlines(), strict=False):
        assert " ".join(row) in " ".join(line.split())
    settings = {line["name"]: (line["values"], line["differs"]) for line in content["settings"]}
    assert settings["dataset"] == (["https://host/a.jsonl", "b.jsonl"], True)
    assert settings["seed"] == (["1", "1"], False) and "output_dir" not in settings
    (row,) = content["prompts"]
    assert (row["prompt"], row["adapted"], row["base"]) == (lines[0]["prompt"], ["x", None], ["?", None])


def test_one_run_alone_makes_a_page(run, make_run, tmp_path):
    make_run("a", [record(1, 3.0)])
    code, _, err = run("a", "--html", "page.html")
    assert code == 0 and (tmp_path / "page.html").read_text().endswith("</html>\n"), err


def test_answers_that_are_not_valid_are_one_line_and_exit_2(run, make_run, tmp_path):
    directory = make_run("a", [record(1, 1.0)])
    (directory / "answers.jsonl").write_text('{"prompt": 1}\n')
    code, out, err = run("a", "--html", "page.html")
    assert (
        code == 2 and "answers.jsonl, line 1 holds no answers" in err and err.count("\n") == 1 and out == ""
    )
    assert not (tmp_path / "page.html").exists()
