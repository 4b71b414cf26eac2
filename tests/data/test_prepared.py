"""Saved tokens with the right key and wrong tensors are ignored, as those of other rows are."""

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from minilora.data.prepared import load_tokens
from minilora.data.rows import Row

ROWS = [Row("a", "b"), Row("c", "d")]


def good() -> dict[str, np.ndarray]:
    return {
        "input_ids": np.array([1, 5, 2, 1, 7, 8], np.int32),
        "loss_mask": np.array([0, 1, 1, 0, 0, 1], bool),
        "lengths": np.array([3, 3], np.int32),
        "uncut_lengths": np.array([3, 9], np.int32),
        "row_indices": np.array([0, 1], np.int32),
    }


def load(path, tensors, **options):
    save_file(tensors, path / "a.safetensors", metadata={"key": "k"})
    return load_tokens(path / "a.safetensors", ROWS, "k", **options)


def test_tensors_that_fit_the_rows_are_used(tmp_path):
    loaded = load(tmp_path, good() | {"more": np.zeros(3)}, cutoff_len=3)
    assert [example.input_ids.tolist() for example in loaded.examples] == [[1, 5, 2], [1, 7, 8]]
    assert loaded.truncated == 1 and loaded.rows is ROWS


def test_the_pieces_of_one_row_are_examples_of_their_own(tmp_path):
    save_file(
        good() | {"row_indices": np.array([0, 0], np.int32)},
        tmp_path / "a.safetensors",
        metadata={"key": "k"},
    )
    loaded = load_tokens(tmp_path / "a.safetensors", ROWS[:1], "k")
    assert len(loaded.examples) == 2 and len(loaded.rows) == 1 and loaded.row_indices == (0, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lengths": np.array([3, 4], np.int32)},
        {"lengths": np.array([7, -1], np.int32)},
        {"lengths": np.array([6, 0], np.int32)},
        {"lengths": np.array([6], np.int32)},
        {"lengths": np.array([3, 3], np.int64)},
        {"lengths": np.array([[3, 3]], np.int32)},
        {"lengths": np.array(6, np.int32)},
        {"lengths": np.array([2**31 - 1, 2**31 - 1], np.int32)},  # their sum in int32 is -2
        {"uncut_lengths": np.array([3], np.int32)},
        {"uncut_lengths": np.array([3, 2], np.int32)},
        {"row_indices": np.array([0], np.int32)},
        {"row_indices": np.array([0, 0], np.int32)},  # nothing of the second row
        {"row_indices": np.array([1, 1], np.int32)},
        {"row_indices": np.array([0, 2], np.int32)},
        {"row_indices": np.array([1, 0], np.int32)},
        {"row_indices": np.array([-1, 1], np.int32)},
        {"input_ids": np.array([1, 5, 2, 1, 7, -8], np.int32)},
        {"input_ids": np.array([1, 5, 2, 1, 7, 8], np.float32)},
        {"input_ids": np.array([1, 5], np.int32)},
        {"loss_mask": np.array([1, 1, 1, 0, 0, 1], bool)},  # the first token is never learned
        {"loss_mask": np.array([0, 1, 1, 0, 0, 0], bool)},  # nothing to learn
        {"loss_mask": np.array([0, 1, 1, 0, 0, 1], np.uint8)},
        {"loss_mask": np.array([], bool)},
    ],
)
def test_tensors_that_do_not_fit_are_ignored(tmp_path, wrong):
    assert load(tmp_path, good() | wrong) is None


@pytest.mark.parametrize("name", good())
def test_a_tensor_that_is_missing_means_that_the_file_is_ignored(tmp_path, name):
    assert load(tmp_path, {other: tensor for other, tensor in good().items() if other != name}) is None


def test_an_example_longer_than_a_row_is_ignored(tmp_path):
    assert load(tmp_path, good(), cutoff_len=2) is None


def test_no_rows_have_no_tokens(tmp_path):
    save_file(
        {name: tensor[:0] for name, tensor in good().items()},
        tmp_path / "a.safetensors",
        metadata={"key": "k"},
    )
    assert load_tokens(tmp_path / "a.safetensors", [], "k") is None


@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_with_a_wrong_byte_is_ignored_or_fits_the_rows(tmp_path, data):
    path = tmp_path / "a.safetensors"
    save_file(good(), path, metadata={"key": "k"})
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content))) or None])
    loaded = load_tokens(path, ROWS, "k")
    os.unlink(path)
    if loaded is not None:
        assert len(loaded) == 2 and all(len(example.input_ids) > 1 for example in loaded.examples)
        assert all(example.supervised > 0 and not example.loss_mask[0] for example in loaded.examples)
