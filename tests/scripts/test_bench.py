"""What bench.py says of a time is that time, of a token that it is useful, and both sides compute the same."""

import json
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import bench
import bench_sides
import bench_work
import numpy as np
import pytest
import torch
from bench_work import Product

from minilora import UserError, load_tokenizer
from minilora.data.examples import Example
from minilora.formats.config_json import parse_config
from minilora.formats.weights import read_config
from minilora.recompute import POLICIES
from minilora.system.assets import EMBEDDED_MODEL
from minilora.system.device import Placement, choose_placement

OPTIONS = dict(
    width=64, layers=2, vocab=640, batch=2, tokens=40, steps=3, quantization_bit="none", optim="adamw_torch",
    gradient_checkpointing="off", data=None, tokenizer=None, peer=False,
)  # fmt: skip


def example(ids: list[int], prompt: int) -> Example:
    """An example whose tokens after the prompt are learned."""
    return Example(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= prompt, (len(ids),))


# ---- clocks ----------------------------------------------------------------------------------------------------------


def test_on_a_gpu_kernels_are_timed_by_events_and_the_host_waits_once(monkeypatch):
    """A clock that only the kernel moves stands for the GPU's: what the host does takes no time there."""
    gpu, waits, took = {"now": 0.0}, [], iter([9.0, 9.0, 0.05, 0.06, 0.04])

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self):
            self.at = gpu["now"]

        def elapsed_time(self, end):
            assert waits, "read before the GPU was there"
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waits.append(device))
    kernel = lambda: gpu.update(now=gpu["now"] + next(took))  # noqa: E731
    assert bench_work.median_seconds(kernel, torch.device("cuda"), calls=3) == pytest.approx(50e-6)
    assert len(waits) == 1


def test_on_a_cpu_the_median_time_is_the_functions_own():
    pauses = iter([0.0, 0.0, 0.02, 0.2, 0.01])
    seconds = bench_work.median_seconds(lambda: time.sleep(next(pauses)), torch.device("cpu"), calls=3)
    assert 0.02 <= seconds < 0.2


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_of_examples_are_useful_and_padding_is_not():
    steps = [[example([5, 6, 7, 8], 1), example([9, 3], 1)], [example([4] * 10, 3), example([4], 0)]]
    assert [bench_work.useful_tokens(step) for step in steps] == [6, 11]
    # 17 tokens in 2 + 6 seconds, although the median step takes 4.
    assert bench.summary([2.0, 6.0], steps) == dict(
        step_seconds=[2.0, 6.0], median_seconds=4.0, tokens_per_second=17 / 8
    )
    line = bench_work.describe_steps(steps)
    assert "4 examples of 1 to 10 tokens, 17 in all, 28 when padded" in line


def test_the_peer_gets_the_tokens_padded_with_a_mask_and_no_label_on_prompts_and_padding():
    batch = bench_sides.padded([example([5, 6, 7, 8], 2), example([9, 3], 1)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 3, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 3, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert "attention_mask" not in bench_sides.padded([example([5, 6], 1), example([9, 3], 1)])


ROWS = [dict(prompt="count:", completion="one two " * (1 + 3 * i)) for i in range(7)]


@pytest.fixture
def data(tmp_path) -> str:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return str(tmp_path / "rows.json")


def test_steps_on_a_file_take_each_of_its_examples_once_an_epoch_and_cut_them(data):
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    options = Namespace(**OPTIONS | dict(data=data, tokenizer=EMBEDDED_MODEL, steps=4, batch=2, tokens=50))
    steps = bench_work.steps_of(options, read_config(EMBEDDED_MODEL))
    prompt = tokenizer.encode("count:")
    whole = [prompt + tokenizer.encode(row["completion"], bos=False, eos=True) for row in ROWS]
    assert min(map(len, whole)) < 50 < max(map(len, whole))
    assert sorted(map(len, steps)) == [1, 2, 2, 2]
    examples = [e for step in steps for e in step]
    assert sorted(e.input_ids.tolist() for e in examples) == sorted(ids[:50] for ids in whole)
    for e in examples:
        assert e.loss_mask.tolist() == [i >= len(prompt) for i in range(len(e.input_ids))]


def test_a_file_of_another_models_tokens_is_refused(data):
    options = Namespace(**OPTIONS | dict(data=data, tokenizer=EMBEDDED_MODEL))
    config = parse_config(
        json.loads((Path(EMBEDDED_MODEL) / "config.json").read_text()) | dict(vocab_size=10)
    )
    with pytest.raises(UserError, match="the model has 10 tokens"):
        bench_work.steps_of(options, config)


def test_data_without_a_tokenizer_is_refused_before_anything_is_written(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.py", "--data", "rows.json"])
    with pytest.raises(UserError, match="--tokenizer"):
        bench.parse_options()


def ragged() -> list[Example]:
    generator = np.random.default_rng(0)
    return [
        example(generator.integers(1, 640, n).tolist(), prompt) for n, prompt in ((40, 1), (17, 9), (3, 2))
    ]


def test_both_sides_have_the_same_loss_and_gradients_on_ragged_examples(tmp_path):
    for package in ("transformers", "peft", "bitsandbytes"):
        pytest.importorskip(package)
    options = Namespace(**OPTIONS, model=str(tmp_path / "model"))
    bench.write_random_model(options)
    placement = Placement(torch.device("cpu"), torch.float32, "")
    losses, gradients = {}, {}
    for name, load in ((bench.OURS, bench_sides.load_ours), (bench.PEER, bench_sides.load_peer)):
        losses[name], gradients[name] = load(options, placement).gradients(ragged())
    assert len(gradients[bench.OURS]) == 2 * 4  # B's: A's are zero before the first step
    bench.compare(losses, gradients, torch.float32)  # raises where they differ
    losses[bench.PEER] *= 1.001
    with pytest.raises(UserError, match="do not compute the same"):
        bench.compare(losses, gradients, torch.float32)


def test_our_side_learns_what_the_examples_say(tmp_path):
    options = Namespace(**OPTIONS, model=str(tmp_path / "model"))
    bench.write_random_model(options)
    side = bench_sides.load_ours(options, Placement(torch.device("cpu"), torch.float32, ""))
    before, _ = side.gradients(ragged())
    # An untrained model's logits have a deviation of 0.02 sqrt(64) = 0.16. So the mean loss of 48 tokens is
    # log 640 + 0.16^2 / 2, give or take 0.16 / sqrt(48) = 0.023. 0.1 is over three of these.
    assert before == pytest.approx(np.log(640), abs=0.1)
    for _ in range(5):
        side.step(ragged())
    assert side.gradients(ragged())[0] < before


# ---- the products alone ----------------------------------------------------------------------------------------------

SHAPE = dict(
    model_type="llama", hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=97, max_position_embeddings=64,
)  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
def test_the_products_of_a_step_are_those_of_every_layer_and_of_the_head_on_learned_rows(policy):
    found = bench_work.products_of(parse_config(SHAPE), policy, [example([1] * 7, 3), example([2] * 5, 1)])
    rows, learned, runs = 7 + 5, 4 + 4, 1 if policy == "off" else 2
    expected = {
        Product("forward", rows, (64, 64)): 3 * 2 * runs,  # q and o
        Product("forward", rows, (32, 64)): 3 * 2 * runs,  # k and v
        Product("forward", rows, (160, 64)): 3 * 2 * runs,  # gate and up
        Product("forward", rows, (64, 160)): 3,  # down: never computed again
        Product("backward", rows, (64, 64)): 3 * 2 - 1,  # the first layer's q, k and v pass nothing on
        Product("backward", rows, (32, 64)): 3 * 2 - 2,
        Product("backward", rows, (160, 64)): 3 * 2,
        Product("backward", rows, (64, 160)): 3,
        Product("forward", learned, (97, 64)): 1,
        Product("backward", learned, (97, 64)): 1,
    }
    assert found == expected


def test_the_time_of_a_steps_products_is_the_sum_over_its_layers(monkeypatch):
    asked = []

    def seconds(product: Product, placement: Placement) -> float:
        asked.append(product)
        return product.rows if product.direction == "forward" else 100.0 * product.rows

    monkeypatch.setattr(bench_work, "product_seconds", seconds)
    steps = [[example([1] * 6, 1)], [example([1] * 6, 1)], [example([1] * 11, 1)]]
    config = parse_config(SHAPE | dict(vocab_size=64))  # the head is as large as q, its rows are fewer
    found = bench_work.time_products(steps, config, "off", choose_placement())
    # 7 layers of 3 forward; 3 fewer backward; the head for the rows that have a next token.
    expected = [rows * (21 + 100 * 18) + (rows - 1) * (1 + 100) for rows in (6, 6, 11)]
    assert found == expected
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("direction, shapes", [("forward", (5, 64, 97)), ("backward", (5, 97, 64))])
def test_a_product_alone_has_the_shapes_of_the_layers(direction, shapes, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "mm", lambda x, w, out: seen.append((*x.shape, w.shape[1], *out.shape)))
    product = Product(direction, 5, (97, 64))
    assert bench_work.product_seconds(product, Placement(torch.device("cpu"), torch.float32, "")) > 0
    assert set(seen) == {(*shapes, 5, shapes[2])}


def test_the_table_says_which_share_of_each_side_the_products_are(capsys):
    side = dict(
        load_seconds=1.0,
        median_seconds=2.0,
        tokens_per_second=10.0,
        peak_bytes=1 << 30,
        step_seconds=[2.0, 2.0],
    )
    peer = dict(
        load_seconds=3.0,
        median_seconds=5.0,
        tokens_per_second=4.0,
        peak_bytes=2 << 30,
        step_seconds=[5.0, 3.0],
    )
    products = dict(step_seconds=[0.5, 0.5], median_seconds=0.5, tokens_per_second=40.0)
    report = dict(
        sides={bench.OURS: side, bench.PEER: peer}, products=products, dequantize_bytes_per_second=1e9
    )
    bench.show(report)
    assert report["sides"][bench.OURS]["share_of_products"] == 0.25
    assert report["sides"][bench.PEER]["share_of_products"] == 0.125
    assert report["ratios"] == dict(load=3.0, step=2.5, memory=2.0, speed=2.5)
    table = capsys.readouterr().out
    assert "25%" in table and "12%" in table and "products alone" in table
