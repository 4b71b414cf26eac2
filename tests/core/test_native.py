"""The C library is used only where it gives the bits of the PyTorch definitions, which stand in the source as digests."""

from pathlib import Path

import pytest
import torch

from minilora import optim, quantization
from minilora.backend import native, native_trial


@pytest.mark.parametrize("dtype", native._NAMES)
def test_the_known_bits_of_4bit_quantization_are_those_of_the_definitions(dtype):
    name = native._NAMES[dtype]
    quantized = native_trial.quantize_trial(quantization.quantize_definition, dtype)
    dequantized = native_trial.dequantize_trial(quantization.dequantize_definition, dtype)
    assert native_trial.digest(quantized) == native_trial.KNOWN_BITS[f"quantize_{name}"]
    assert native_trial.digest(dequantized) == native_trial.KNOWN_BITS[f"dequantize_{name}"]


def test_the_known_bits_of_adamw_are_those_of_the_definition_on_a_cpu_with_fma():
    x = torch.tensor([1 + 2**-12])
    if (x.square().neg().add(x, alpha=1 + 2**-12) == 0).all():  # x^2 was rounded, and cancelled
        pytest.skip("PyTorch uses no FMA on this CPU and rounds a product before it is added")
    steps = iter((1, 2, 3))

    def definition(tensors, codes, nearest, scalars):
        step, settings = next(steps), (1e-3, (0.9, 0.999), 1e-8, 1e-2)
        assert scalars == optim._scalars(*settings, step)
        for code, table in zip(codes, nearest, strict=True):
            assert torch.equal(table, quantization.nearest_of_steps(code))
        optim.adamw_8bit_definition(tensors, codes, *settings, step)

    assert (
        native_trial.digest(native_trial.adamw_trial(definition, torch.float32))
        == native_trial.KNOWN_BITS["adamw_8bit"]
    )


def test_a_digest_changes_with_one_bit():
    x = torch.zeros(1000)
    before = native_trial.digest([x])
    x.view(torch.int32)[-1] = 1
    assert native_trial.digest([x]) != before


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="this system does not tell what is loaded")
def test_the_library_shares_the_threads_of_pytorch_where_it_brings_gnu_openmp():
    folder = str(Path(torch.__file__).parent / "lib" / "libgomp")
    assert (native._gomp_parallel() is not None) == (folder in Path("/proc/self/maps").read_text())


def test_a_library_with_other_bits_is_one_line_whatever_operations_ask(monkeypatch, capsys):
    if not native_trial.is_trusted("quantize"):
        pytest.skip("no C compiler: the definition is all there is")
    caches = native_trial.is_trusted, native._warn_once
    try:
        with monkeypatch.context() as patch:
            patch.setattr(native_trial, "KNOWN_BITS", dict.fromkeys(native_trial.KNOWN_BITS, "other bits"))
            for cache in caches:
                cache.cache_clear()
            assert not any(native_trial.is_trusted(name) for name in ("quantize", "dequantize", "adamw_8bit"))
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "other bits than PyTorch; set CC" in said
    finally:
        for cache in caches:
            cache.cache_clear()
