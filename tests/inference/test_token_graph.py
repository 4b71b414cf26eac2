"""A token's layers recorded once and repeated: the numbers are those of the model, whatever Python would do."""

import weakref

import pytest
import torch
from support.pretended_gpu import PretendedGpu
from support.tiny import randomize, small_model, tiny_model

from minilora import LoraConfig, add_lora
from minilora.backend import graphs, scratch
from minilora.backend.documents import PADDING
from minilora.inference import token_graph
from minilora.inference.generation import generate
from minilora.inference.token_graph import LEAST_TOKENS, TokenGraph
from minilora.model import KVCache

PROMPT, NEW = 9, 24
TOLERANCE = 1e-5  # float32 sums in another order, as in test_model
TF32 = 12 * 2**-11  # what tensor cores make of them in the efficient attention, as in test_attention
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
MODELS = {
    "llama": dict(),
    "windowed": dict(model_type="mistral", sliding_window=5),
    "windows by layer": dict(
        model_type="ministral",
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        head_dim=6,
    ),
    "qwen3": dict(model_type="qwen3", head_dim=8),
    "llama3 rope": dict(rope_scaling=LLAMA3),
    "dynamic rope": dict(rope_scaling=dict(rope_type="dynamic", factor=2.0), max_position_embeddings=16),
}
DOCUMENTS = {
    "one row": None,
    "padded": torch.tensor([[PADDING] * 2 + [0] * 7, [0] * 9, [PADDING] * 5 + [0] * 4]),
}


def both_ways(model, documents, tolerance=TOLERANCE):
    """The logits of some tokens as the model gives them, and as a graph does."""
    device = torch.device("cuda", 0)
    B = 1 if documents is None else len(documents)
    ids = torch.arange(B * (PROMPT + NEW)).view(B, -1).mul(7).remainder(61).to(device)
    caches = [KVCache(model.config, B, PROMPT + NEW, torch.float32, device) for _ in range(2)]
    expected, found = [], []
    with torch.no_grad():
        for cache in caches:
            model.model(ids[:, :PROMPT], document_ids=documents, cache=cache)
        graph = TokenGraph(model, caches[1])
        for i in range(PROMPT, PROMPT + NEW):
            new = ids[:, i : i + 1], None if documents is None else torch.zeros(B, 1, dtype=torch.long)
            hidden = model.model(new[0], document_ids=new[1], cache=caches[0])
            expected.append(model.lm_head(hidden[:, -1]).float())
            found.append(graph.read(*new).clone())
            assert caches[0].length == caches[1].length
    for ours, theirs in zip(caches[0].keys, caches[1].keys, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * ours.abs().max()
    return torch.stack(expected).cpu(), torch.stack(found).cpu()


@pytest.fixture(params=[8, 16, 256])
def keys(request, monkeypatch):
    """A graph sees so many keys: fewer than a text has, or more."""
    monkeypatch.setattr(token_graph, "KEYS", request.param)


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_graph_gives_the_logits_and_the_cache_of_the_model(kind, documents):
    with PretendedGpu() as gpu:
        model = tiny_model(**MODELS[kind]).cuda()
        expected, found = both_ways(model, DOCUMENTS[documents])
    assert (expected - found).abs().max() <= TOLERANCE * expected.abs().max()
    assert gpu.launches["a graph"] > NEW / 2 and not gpu.faults


@pytest.mark.parametrize("adapter", [dict(), dict(use_dora=True), dict(lora_bias=True, bias="none")])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_graph_has_the_adapter_in_it(adapter, quantized):
    model = small_model(layers=2, quantized=quantized)
    add_lora(model, LoraConfig(r=4, target_modules="all-linear", **adapter), "other")
    randomize(model)
    with PretendedGpu() as gpu:
        expected, found = both_ways(model.eval().cuda(), None)
    assert (expected - found).abs().max() <= TOLERANCE * expected.abs().max() and not gpu.faults


def test_a_token_is_one_launch_and_what_is_before_the_layers():
    model = small_model(layers=6, quantized=True).eval()
    with PretendedGpu() as gpu:
        model.cuda()
        cache = KVCache(model.config, 1, 40, torch.float32, torch.device("cuda", 0))
        token = torch.ones(1, 1, dtype=torch.long).cuda()
        graph = TokenGraph(model, cache)
        graph.read(token)
        with gpu.during() as record:
            graph.read(token)
    assert record.launches["a graph"] == 1 and sum(record.launches.values()) < 40
    assert not record.waits and not record.variants


def test_a_graph_holds_the_shared_buffers_that_it_writes_to():
    """A larger buffer takes the place of a smaller one, whose memory then must not become somebody else's."""
    with PretendedGpu():
        device = torch.device("cuda", 0)
        buffer = weakref.ref(scratch.scratch((4, 4), torch.float32, device)._base)
        replay = graphs.recorded(lambda: None, device)
        scratch.scratch((40, 40), torch.float32, device)
        assert buffer() is not None
        del replay
        assert buffer() is None


def test_what_stands_behind_the_mask_does_not_matter():
    with PretendedGpu():
        model = tiny_model().cuda()
        cache = KVCache(model.config, 1, 40, torch.float32, torch.device("cuda", 0))
        token, graph = torch.ones(1, 1, dtype=torch.long).cuda(), TokenGraph(model, cache)
        first = [graph.read(token).clone() for _ in range(20)]
        cache.length = 0  # the keys and values stay
        again = [graph.read(token).clone() for _ in range(20)]
    assert all(map(torch.equal, first, again))


def answer(model, **settings):
    prompt = torch.arange(2 * PROMPT).view(2, PROMPT) % 61
    mask = torch.tensor([[0, 0] + [1] * 7, [1] * 9])
    settings = dict(max_new_tokens=NEW, eos_token_ids=()) | settings
    device = model.model.norm.weight.device
    return generate(model, prompt.to(device), mask, **settings).cpu()


def test_an_answer_by_a_graph_is_the_answer_of_a_cpu():
    expected = answer(tiny_model())
    with PretendedGpu() as gpu:
        assert torch.equal(answer(tiny_model().cuda()), expected)
    assert gpu.launches["a graph"] == NEW - 2  # after the prompt's token, and the one that is read before


def test_where_recording_fails_one_line_says_so_and_the_answer_is_the_same(monkeypatch, capsys):
    expected, tries = answer(tiny_model()), []

    def refused(*_, **__):
        tries.append(1)
        raise RuntimeError("no graphs\non this card")

    monkeypatch.setattr(graphs, "_problem", "")
    with PretendedGpu() as gpu, monkeypatch.context() as patch:
        patch.setattr(torch.cuda.CUDAGraph, "capture_begin", refused)
        for _ in range(2):
            assert torch.equal(answer(tiny_model().cuda()), expected)
    assert tries == [1] and not gpu.launches["a graph"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "without CUDA graphs: RuntimeError: no graphs on this card" in said


def test_modules_that_are_watched_are_called_for_each_token():
    model, seen = tiny_model(), []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    with PretendedGpu() as gpu:
        answer(model.cuda())
    assert len(seen) >= NEW and not gpu.launches["a graph"]


def test_a_short_answer_and_a_model_in_training_are_not_worth_a_graph():
    with PretendedGpu() as gpu:
        answer(tiny_model().cuda(), max_new_tokens=LEAST_TOKENS - 1)
        answer(tiny_model().train().cuda())
        answer(tiny_model().cuda(), use_cache=False)
    assert not gpu.launches["a graph"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["llama", "windows by layer"])
def test_a_graph_gives_the_logits_of_the_model_on_the_gpu(kind, adapted, documents, monkeypatch):
    monkeypatch.setattr(graphs, "_problem", "")
    model = tiny_model(**MODELS[kind] | dict(hidden_size=128, head_dim=32))
    if adapted:
        add_lora(model, LoraConfig(r=4, target_modules="all-linear"))
        randomize(model)
    expected, found = both_ways(model.eval().cuda(), DOCUMENTS[documents], TF32)
    assert not graphs._problem
    assert (expected - found).abs().max() <= TF32 * expected.abs().max()
