"""scripts/experiments.py repeats the studies of docs/experiments.md, and their figures support its sentences."""

import json
import sys

import experiments
import pytest
from experiments import STUDIES, study, with_table
from support.project import ROOT

from minilora.system.errors import UserError, run_script

DOCUMENT = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
COMMITTED = {name: ROOT / "docs" / "experiments" / f"{name}.json" for name in STUDIES}


def figures_of(name: str) -> dict:
    return json.loads(COMMITTED[name].read_text(encoding="utf-8"))


def run(monkeypatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["experiments.py", *map(str, words)])
    run_script(experiments.main)


# ---- the command -------------------------------------------------------------------------------------------


def test_without_a_name_it_lists_every_study_with_its_question(monkeypatch, capsys):
    run(monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(STUDIES) and all(line.endswith("?") for line in lines)


def test_every_study_has_a_file_and_every_file_is_a_study_or_shared():
    files = {path.stem for path in (ROOT / "scripts/studies").glob("*.py")} - {"__init__"}
    assert files - set(STUDIES) == {"small_world", "drawing"} and set(STUDIES) <= files


@pytest.mark.parametrize("name", STUDIES)
def test_a_quick_run_measures_draws_and_prints_a_table_and_can_be_drawn_again(
    name, monkeypatch, tmp_path, capsys
):
    run(monkeypatch, name, "--quick", "--output", tmp_path)
    figures, picture = json.loads((tmp_path / f"{name}.json").read_text()), tmp_path / f"{name}.png"
    assert figures["study"] == name and figures["quick"] is True
    table = study(name).table(figures)
    assert table in capsys.readouterr().out and table.count("\n") >= 2
    drawn = picture.read_bytes()
    assert drawn[:8] == b"\x89PNG\r\n\x1a\n" and len(drawn) < 150_000
    picture.unlink()
    run(monkeypatch, name, "--redraw", "--output", tmp_path)
    assert picture.read_bytes() == drawn


def test_a_new_table_stands_between_its_marks_and_nothing_else_changes():
    text = "a\n<!-- table: one -->\nold\n<!-- end -->\nb\n<!-- table: two -->\nkept\n<!-- end -->\n"
    assert with_table(text, "one", "new") == text.replace("old", "new")
    assert with_table(text, "two", "new") == text.replace("kept", "new")
    with pytest.raises(UserError, match="<!-- table: three -->"):
        with_table(text, "three", "new")


def test_a_quick_run_does_not_replace_the_figures_of_the_repository(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "rank_and_rate", "--quick", "--output", ROOT / "docs" / "experiments")
    assert end.value.code == 2 and "--quick" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    ['{"study": "other"}', '{"study": "rank_and_rate"}', '{"study": "rank_and_rate", "curves": [0]}'],
)
def test_figures_that_are_of_another_study_or_not_whole_are_a_mistake_of_one_line(
    content, monkeypatch, tmp_path, capsys
):
    (tmp_path / "rank_and_rate.json").write_text(content)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "rank_and_rate", "--redraw", "--output", tmp_path)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and "rank_and_rate.json" in err


# ---- the document ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDIES)
def test_the_documents_table_and_picture_are_of_the_committed_figures_of_a_whole_study(name):
    figures = figures_of(name)
    assert figures["study"] == name and figures["quick"] is False
    assert with_table(DOCUMENT, name, study(name).table(figures)) == DOCUMENT
    assert f"](experiments/{name}.png)" in DOCUMENT
    assert COMMITTED[name].with_suffix(".png").stat().st_size < 150_000
    assert f"python scripts/experiments.py {name}" in DOCUMENT


# ---- the document's sentences: each is read from the committed figures --------------------------------------


def curves_of(kind: str) -> dict[int | None, dict]:
    """Rank -> curve of rank_and_rate, of one kind."""
    return {curve.get("r"): curve for curve in figures_of("rank_and_rate")["curves"] if curve["kind"] == kind}


def at(curve: dict, rate: float) -> float:
    return curve["losses"][curve["rates"].index(rate)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def overlap(one: list[float], other: list[float]) -> bool:
    return max(min(one), min(other)) <= min(max(one), max(other))


def test_with_alpha_over_r_all_ranks_want_the_same_rate_within_a_factor_of_two_and_learn_alike_below_it():
    curves = curves_of("alpha / r")
    assert set(curves) == {1, 2, 4, 8, 16, 32, 64}
    assert {curve["best_rate"] for curve in curves.values()} == {4e-3, 8e-3}
    low = [at(curve, 1e-3) for curve in curves.values()]
    assert max(low) < 1.1 * min(low)


def test_with_alpha_over_the_root_of_r_the_best_rate_falls_and_below_it_higher_ranks_learn_faster():
    curves = curves_of("alpha / sqrt(r)")
    best = [curves[r]["best_rate"] for r in sorted(curves)]
    assert (best[0], best[-1]) == (1.6e-2, 4e-3) and best == sorted(best, reverse=True)
    low = [at(curves[r], 1e-3) for r in sorted(curves)]
    assert low == sorted(low, reverse=True) and max(low) > 2 * min(low)


def test_loras_best_rate_is_4_or_8_times_the_best_rate_of_full_training():
    full = curves_of("all weights")[None]["best_rate"]
    ratios = [curve["best_rate"] / full for curve in curves_of("alpha / r").values()]
    assert {round(ratio, 6) for ratio in ratios} == {4, 8}


def test_a_rate_that_is_too_high_costs_more_than_one_that_is_too_low():
    for curve in curves_of("alpha / r").values():
        assert at(curve, 1.6e-2) > 2.5 * at(curve, 8e-3) > at(curve, 4e-3)
        assert at(curve, 3.2e-2) > 10 * at(curve, 8e-3)


def test_rank_64_beats_rank_1_in_every_seed_by_less_than_a_factor_of_two():
    one, many = (curves_of("alpha / r")[r]["seed_losses"] for r in (1, 64))
    assert max(many) < min(one) and mean(one) < 2 * mean(many)


def test_noise_hides_the_order_of_the_ranks_between_and_whether_lora_beats_full_training():
    curves, full = curves_of("alpha / r"), curves_of("all weights")[None]["seed_losses"]
    assert max(curves[8]["seed_losses"]) > 2 * min(curves[8]["seed_losses"])
    assert mean(curves[16]["seed_losses"]) > mean(curves[4]["seed_losses"])
    ranges = [max(c["seed_losses"]) - min(c["seed_losses"]) for c in figures_of("rank_and_rate")["curves"]]
    assert max(ranges) == pytest.approx(0.14, abs=0.005)
    overlapping = {r: overlap(curves[r]["seed_losses"], full) for r in (8, 32, 64)}
    assert all(overlapping.values())


def rows_of(kind: str) -> dict[int, dict]:
    """Rank -> row of singular_values, of dW that is `cut` or of `lora`."""
    return {row["r"]: row for row in figures_of("singular_values")[kind]}


def test_few_singular_values_hold_half_of_an_update_and_64_are_needed_for_95_percent():
    for values in figures_of("singular_values")["singular_values"].values():
        squares = [value**2 for value in values]
        assert sum(squares[:5]) >= sum(squares) / 2
    kept = {r: mean(row["kept"]) for r, row in rows_of("cut").items()}
    assert kept[32] < 0.95 <= kept[64]


def test_16_directions_have_nearly_the_loss_of_all_and_fewer_than_8_lose_most_answers():
    cut = rows_of("cut")
    assert all(few - every < 0.03 for few, every in zip(cut[16]["losses"], cut[192]["losses"], strict=True))
    right = {r: mean(row["right"]) for r, row in cut.items()}
    assert right[8] == pytest.approx(1 / 2, abs=0.02) and right[4] == pytest.approx(1 / 3, abs=0.03)
    assert right[1] < 0.05 and right[192] > 0.6


def test_lora_trained_at_rank_1_answers_what_an_update_cut_to_rank_1_does_not():
    assert min(rows_of("lora")[1]["right"]) > 10 * max(rows_of("cut")[1]["right"])
    assert mean(rows_of("lora")[1]["right"]) == pytest.approx(1 / 2, abs=0.03)


def test_two_seeds_of_rank_2_disagree_by_more_than_ranks_do_and_no_rank_above_8_is_better():
    lora = rows_of("lora")
    assert {round(share, 2) for share in lora[2]["right"]} == {0.43, 0.17}
    assert all(mean(lora[r]["losses"]) > mean(lora[8]["losses"]) for r in (16, 32, 64))


def test_all_seven_layers_beat_every_other_set_in_every_seed_and_by_half():
    rows = {row["layers"]: row for row in figures_of("equal_budgets")["rows"]}
    sizes = [row["parameters"] for row in rows.values()]
    assert len(rows) == 4 and max(sizes) < 1.03 * min(sizes)
    every = rows.pop("all seven")
    assert all(max(every["seed_losses"]) < min(row["seed_losses"]) for row in rows.values())
    assert 2 * mean(every["seed_losses"]) < min(mean(row["seed_losses"]) for row in rows.values())


def test_feed_forward_layers_come_second_attention_third_and_q_v_last_with_the_highest_rate_and_rank():
    rows = {row["layers"]: row for row in figures_of("equal_budgets")["rows"]}
    forward, attention, q_v = (rows[name] for name in ("gate up down", "q k v o", "q v"))
    assert mean(forward["seed_losses"]) < mean(attention["seed_losses"]) < mean(q_v["seed_losses"])
    assert q_v["r"] == max(row["r"] for row in rows.values())
    assert [row["best_rate"] for row in rows.values()] == [1.6e-2, 8e-3, 8e-3, 8e-3]
    assert overlap(forward["seed_losses"], attention["seed_losses"])
    low, high = sorted(attention["seed_losses"])
    assert all(low < loss < high for loss in q_v["seed_losses"])


def forgotten(name: str) -> list[dict[int, dict]]:
    """For each seed: step -> the figures of a run of forgetting."""
    keys = ("steps", "losses", "right", "perplexity")
    runs = [run for run in figures_of("forgetting")["runs"] if run["name"] == name]
    return [
        {
            step: dict(loss=loss, right=right, perplexity=text)
            for step, loss, right, text in zip(*columns, strict=True)
        }
        for columns in ([run[key] for key in keys] for run in runs)
    ]


def at_step(name: str, step: int, key: str) -> list[float]:
    """A figure of a run of forgetting at one step, for each seed."""
    return [figures[step][key] for figures in forgotten(name)]


ONE, MANY, ALL, LOW = "LoRA, r = 1", "LoRA, r = 16", "all weights", ", a quarter of the rate"


def test_at_its_usual_rate_full_training_forgets_more_than_lora_of_both_ranks():
    assert len(forgotten(ALL)) == 2
    assert [round(text, 1) for text in at_step(ALL, 0, "perplexity")] == [2.4, 2.4]
    assert min(at_step(ALL, 320, "perplexity")) > 7
    for name in (ONE, MANY):
        assert max(at_step(name, 320, "perplexity")) < 4.5
    start, more = at_step(ONE, 0, "perplexity")[0], {}
    for step in (20, 40, 80, 160, 320):
        one, many = (mean(at_step(name, step, "perplexity")) - start for name in (ONE, MANY))
        more[step] = many / one - 1
    assert more.pop(40) == pytest.approx(0.75, abs=0.02) and all(0.2 < share < 0.4 for share in more.values())


def test_the_rate_forgets_more_than_the_method():
    for name in (ALL, MANY):
        assert [round(text, 1) for text in at_step(name + LOW, 320, "perplexity")] == [2.8, 2.8]
        right = mean(at_step(name + LOW, 320, "right"))
        assert right == pytest.approx(mean(at_step(MANY, 320, "right")), abs=0.02)  # 10 of 500 questions
    assert max(at_step(ALL + LOW, 80, "right")) < min(at_step(MANY, 80, "right"))
    assert max(at_step(MANY + LOW, 80, "right")) < min(at_step(MANY, 80, "right"))


def test_forgetting_comes_before_the_right_answers():
    for figures in forgotten(MANY):
        assert max(figures, key=lambda step: figures[step]["perplexity"]) == 40
    assert mean(at_step(MANY, 40, "right")) == pytest.approx(0.4, abs=0.03)
    assert min(at_step(MANY, 80, "right")) > 0.95


def test_longer_than_needed_lora_stands_still_and_full_training_falls_apart():
    for name in (ONE, MANY):
        for figures in forgotten(name):
            before, after = figures[160], figures[320]
            assert after["right"] > 0.95 * before["right"]
            assert after["perplexity"] < 1.05 * before["perplexity"]
    assert min(at_step(ALL, 80, "right")) > 0.8 and max(at_step(ALL, 320, "right")) < 0.5
