"""Which files of a dataset with several splits are read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import UserError
from minilora.data.splits import choose_split, parse_name

SFT = "data/train_sft-00000-of-00003-a3ecf92756993583.parquet"
GEN = "data/train_gen-00000-of-00003-a6c9fb894be3e50b.parquet"
SHARDS = [GEN, SFT, "data/test_sft-00000-of-00001-f7dfac4afe5b93f4.parquet"]


@pytest.mark.parametrize(
    ("names", "place", "chosen"),
    [
        # What the datasets library calls train; a file of no split is training where no other is.
        (["data.jsonl", "test.jsonl", "validation.jsonl"], "a/b", ["data.jsonl"]),
        (["train.jsonl", "data.jsonl", "dev.jsonl"], "a/b", ["train.jsonl"]),
        (["training_0.json", "training_1.json", "eval.json"], "a/b", ["training_0.json", "training_1.json"]),
        (["train/a.csv", "valid/a.csv", "testing/a.csv"], "a/b", ["train/a.csv"]),
        (["train/a.csv", "valid/a.csv", "testing/a.csv"], "a/b[validation]", ["valid/a.csv"]),
        (["train/a.csv", "valid/a.csv", "testing/a.csv"], "a/b[val]", ["valid/a.csv"]),
        (["my_test.json", "my_train.json"], "a/b[test]", ["my_test.json"]),
        (["contest.jsonl", "latest.jsonl", "detraining.txt"], "a/b", ["contest.jsonl", "detraining.txt", "latest.jsonl"]),
        (["main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet"], "a/b/main[test]",
         ["main/test-00000-of-00001.parquet"]),
        (SHARDS, "a/b[train_sft]", [SFT]),
        (SHARDS, "a/b[test]", None),  # it is called test_sft
        ([SFT, SHARDS[2]], "a/b", [SFT]),
        (["test.jsonl"], "a/b", ["test.jsonl"]),  # the only one there is
        (["prefs-00000-of-00002.parquet", "prefs-00001-of-00002.parquet"], "a/b",
         ["prefs-00000-of-00002.parquet", "prefs-00001-of-00002.parquet"]),
        # As datasets.save_to_disk writes them.
        (["train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"], "a/b", ["train/data-00000-of-00001.arrow"]),
        (["data-00000-of-00001.arrow"], "a/b", ["data-00000-of-00001.arrow"]),
    ],
)  # fmt: skip
def test_the_files_of_one_split_are_chosen_by_their_names(names, place, chosen):
    name, split = parse_name(place)
    dataset, folder = name[:3], name[4:]
    if chosen is None:
        with pytest.raises(UserError, match="dataset a/b has no split test; it has .*test_sft"):
            choose_split(names, dataset, folder, split)
    else:
        assert choose_split(names, dataset, folder, split) == chosen


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (SHARDS, "has the splits train_gen, train_sft; choose one, as in a/b[train_gen]"),
        (["train_sft.json", "train_gen.json"], "has the splits train_gen, train_sft; choose one"),
        (
            ["train_sft/data-00000-of-00001.arrow", "train_gen/data-00000-of-00001.arrow"],
            "train_gen, train_sft",
        ),
        (["test.jsonl", "validation.jsonl"], "has the splits test, validation; choose one, as in a/b[test]"),
    ],
)
def test_splits_are_never_mixed(names, said):
    with pytest.raises(UserError) as error:
        choose_split(names, "a/b", "", None)
    assert said in str(error.value)


CARD = """---
license: mit
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: main/part-*
  - split: test
    path: [main/held.jsonl, "main/more/**"]
- config_name: all
  data_files: "**/*.jsonl"
- config_name: rest
  data_dir: more
  data_files:
  - path: x.jsonl
    split: validation
---
# Quiz
"""
FILES = [
    "main/part-1.jsonl",
    "main/part-2.jsonl",
    "main/held.jsonl",
    "main/more/a/b.jsonl",
    "more/x.jsonl",
    "y.jsonl",
]


@pytest.mark.parametrize(
    ("folder", "split", "chosen"),
    [
        ("", None, FILES[:2]),
        ("main", "test", FILES[2:4]),
        ("", "test", FILES[2:4]),
        ("all", None, sorted(FILES)),
        ("rest", None, ["more/x.jsonl"]),
        ("more", None, ["more/x.jsonl"]),  # no subset, but a folder
    ],
)
def test_the_card_of_a_dataset_decides_on_subsets_and_splits(folder, split, chosen):
    assert choose_split(FILES, "a/b", folder, split, CARD) == sorted(chosen)


def test_of_several_subsets_without_a_default_one_has_to_be_chosen():
    with pytest.raises(
        UserError, match="dataset a/b holds the subsets main, all, rest; choose one, as in a/b/main"
    ):
        choose_split(FILES, "a/b", "", None, CARD.replace("  default: true\n", ""))
    named = CARD.replace("  default: true\n", "").replace("config_name: main", "config_name: default")
    assert choose_split(FILES, "a/b", "", None, named) == FILES[:2]


@pytest.mark.parametrize(
    "card",
    [
        "", "# no YAML", "---\n: [\n---\n", "---\nconfigs: 3\n---\n", "---\n- a\n---\n",
        "---\nconfigs: [3, {config_name: a}, {data_files: ''}]\n---\n", "---\nconfigs:\n" + "# x\n" * 100_000 + "---\n",
        "---\nx: !!python/object/apply:os.abort []\n---\n", "---\n" + "[" * 5000 + "\n---\n",
    ],
)  # fmt: skip
def test_a_card_that_says_nothing_of_files_leaves_it_to_their_names(card):
    assert choose_split(["test.jsonl", "train.jsonl"], "a/b", "", None, card) == ["train.jsonl"]


@given(st.text(alphabet="*?/a.[", max_size=12))
def test_any_pattern_of_a_card_chooses_files_or_none(pattern):
    card = f"---\nconfigs:\n- data_files: {pattern!r}\n---\n"
    try:
        assert {*choose_split(FILES, "a/b", "", None, card)} <= {*FILES}
    except UserError as error:  # an empty pattern says nothing
        assert pattern == "" and "holds several" in str(error)
