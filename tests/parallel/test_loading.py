"""Ranks that read and quantize a part of a model hold, together, the bits of one process."""

import pytest
from support.prequantized import quantized_by_transformers

QUANTS = {
    "nf4, double quantization": dict(bits=4),
    "nf4": dict(bits=4, double_quant=False),
    "fp4 in blocks of 128": dict(bits=4, quant_type="fp4", blocksize=128),
    "nf4 in blocks of 4096, one row a layer": dict(bits=4, blocksize=4096),
    "8 bits": dict(bits=8),
    "plain": None,
}


@pytest.fixture(scope="module")
def digests(run_program, wide_dir):
    """The digests of every weight's tensors, by quantization and number of ranks."""
    jobs = {
        f"{ranks} {name}": ("digests", ranks, dict(directory=wide_dir, quant=quant))
        for name, quant in QUANTS.items()
        for ranks in (1, 2, 3)
    }
    offloaded = dict(directory=wide_dir, quant=dict(bits=4), offload=True)
    return run_program("sharded", jobs | {"offloaded": ("digests", 2, offloaded)})


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_gathered_bytes_are_those_of_one_process_bit_for_bit(digests, quant, ranks):
    """640 x 128 weights are five rows of blocks of 64, which three ranks share as two, two and one."""
    (alone,) = digests[f"1 {quant}"]
    assert len(alone) > 14
    assert digests[f"{ranks} {quant}"] == [alone] * ranks


def test_they_are_so_if_the_parts_lie_in_the_cpus_memory(digests):
    assert digests["offloaded"] == digests["1 nf4, double quantization"] * 2


@pytest.fixture(scope="module")
def prequantized(run_program, tmp_path_factory):
    """The same of models in 4 and 8 bits that transformers wrote."""
    jobs = {}
    for bits in (4, 8):
        directory = tmp_path_factory.mktemp("quantized") / "model"
        quantized_by_transformers(directory, bits)
        jobs |= {
            f"{ranks} {bits}": ("digests", ranks, dict(directory=directory, quant=None)) for ranks in (1, 2)
        }
    return run_program("sharded", jobs)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_its_author_quantized_is_cut_as_it_is(prequantized, bits):
    (alone,) = prequantized[f"1 {bits}"]
    assert any(key.endswith("absmax") for key in alone)
    assert prequantized[f"2 {bits}"] == [alone, alone]


@pytest.fixture(scope="module")
def quarters(run_program, deep_dir):
    quants = {"4": dict(bits=4), "8": dict(bits=8), "plain": None}
    jobs = {n: ("bytes_read", 4, dict(directory=deep_dir, quant=quant)) for n, quant in quants.items()}
    return run_program("sharded", jobs)


EMBEDDING, LAYERS = 96 * 256, 24 * 7 * 256 * 256  # weights; the head is tied
KEPT = {  # bytes of the layers
    "4": LAYERS * (0.5 + 1 / 64 + 4 / (64 * 256)),
    "8": LAYERS + 24 * 7 * 256 * 4,  # and a float32 for each row
    "plain": 4 * LAYERS,
}


@pytest.mark.parametrize("quant", KEPT)
def test_each_of_four_ranks_reads_and_keeps_a_quarter(quarters, quant):
    """Of float32 files. Four ranks share the rows and the blocks of every matrix evenly."""
    for rank in quarters[quant]:
        assert rank["all"] == 4 * (EMBEDDING + LAYERS) / 4
        assert rank["at_a_time"] == 4 * 256 * 256 / 4  # of a layer
        assert rank["kept"] == (4 * EMBEDDING + KEPT[quant]) / 4
