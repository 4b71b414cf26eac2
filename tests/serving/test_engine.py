"""minilora/serving/engine.py: whoever is answered beside it, an answer has the tokens that it has alone."""

import random
import time
from dataclasses import replace

import pytest
import torch
from support.serving import EveryAdapter, Said, assets_with_adapters, request_for
from support.tiny import adapted, tiny_model

from minilora import UserError, set_adapter
from minilora.inference.assistant import GenerationSettings
from minilora.inference.generation import generate_stream
from minilora.serving import engine as engine_module
from minilora.serving.engine import Engine, QueueFull, Stopped
from minilora.serving.slots import SlotCache

NAMES = ["one", "two", "three", None]


@pytest.fixture(scope="module")
def model():
    return assets_with_adapters(["one", "two", "three"])


@pytest.fixture
def engine_on():
    """Make engines on a model, which is as it was afterwards."""
    made = []

    def make(model, slots=4, max_length=96, on_device=8, **settings) -> Engine:
        table = model.model.embed_tokens.weight
        cache = SlotCache(model.config, slots, max_length, table.dtype, table.device)
        made.append(Engine(model, EveryAdapter(on_device), cache, **settings))
        return made[-1]

    yield make
    for engine in made:
        engine._unmix()


def alone(model, request, room=96) -> list[int]:
    """The tokens of a request's answer, as scripts/chat.py generates them."""
    set_adapter(model, request.adapter)
    limit = min(request.settings.max_new_tokens, room - len(request.prompt))
    generator = torch.Generator().manual_seed(request.settings.seed)
    settings = request.settings.sampling() | dict(eos_token_ids=request.end_ids, max_new_tokens=limit)
    stream = generate_stream(model, torch.tensor([request.prompt]), generator=generator, **settings)
    return [int(token) for token in stream]


def tokens_told(engine: Engine) -> dict:
    """Let the engine note the tokens of each answer."""
    noted = {}
    extend = engine._extend

    def noting(rows, logits):
        noted.update({row.request: row.answer.tokens for row in rows})
        extend(rows, logits)

    engine._extend = noting
    return noted


def random_request(draw: random.Random, vocab=1500, names=NAMES):
    settings = GenerationSettings(
        temperature=draw.choice([0.0, 0.7, 1.3]),
        top_k=draw.choice([0, 50]),
        top_p=draw.choice([0.9, 1.0]),
        repetition_penalty=draw.choice([1.0, 1.3]),
        max_new_tokens=draw.choice([1, 2, 5, 17, 40]),
        seed=draw.randrange(1000),
    )
    prompt = [draw.randrange(3, vocab) for _ in range(draw.choice([1, 2, 7, 16, 17, 40, 80]))]
    return request_for(prompt, draw.choice(names), settings)


@pytest.mark.parametrize("seed", range(3))
def test_every_answer_has_the_tokens_that_it_has_alone(model, seed, engine_on):
    draw, engine = random.Random(seed), engine_on(model)
    told, requests = tokens_told(engine), []
    while len(requests) < 20 or engine.rows or engine.waiting:
        for _ in range(draw.choice([0, 0, 1, 3]) if len(requests) < 20 else 0):
            requests.append(random_request(draw))
            engine.submit(requests[-1])
        for text in (engine.cache.keys, engine.cache.values):  # slots that nobody has hold anything
            text[:, len(engine.rows) :] = torch.nan
        engine.step()
    engine._unmix()
    assert engine.cache.lengths == []
    for request in requests:
        assert told[request] == alone(model, request)


FAMILIES = {
    "a sliding window in some layers": dict(
        model_type="qwen2", sliding_window=5, use_sliding_window=True, max_window_layers=1
    ),
    "frequencies that depend on the length, dynamic": dict(
        rope_scaling=dict(rope_type="dynamic", factor=2.0), max_position_embeddings=24
    ),
    "frequencies that depend on the length, longrope": dict(
        rope_scaling=dict(
            rope_type="longrope",
            short_factor=[1.0] * 3,
            long_factor=[2.0, 3.0, 4.0],
            original_max_position_embeddings=20,
        ),
        max_position_embeddings=80,
    ),
    "yarn": dict(
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
        max_position_embeddings=64,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_and_stretched_contexts_hold_within_a_batch(family, engine_on):
    model = adapted(tiny_model(**FAMILIES[family]), dropout=0).eval()
    draw, engine = random.Random(1), engine_on(model, slots=5)
    told = tokens_told(engine)
    requests = [random_request(draw, vocab=61, names=["default", None]) for _ in range(16)]
    for request in requests:
        engine.submit(request)
    while engine.rows or engine.waiting:
        engine.step()
    engine._unmix()
    for request in requests:
        assert told[request] == alone(model, request)


def test_requests_join_in_the_order_in_which_they_came(model, engine_on):
    engine, said = engine_on(model, slots=1), Said()
    for i in range(5):
        settings = GenerationSettings(max_new_tokens=1 + i % 2)
        engine.submit(request_for([5 + i], NAMES[i % 4], settings, tell=said.as_(i)))
    while engine.rows or engine.waiting:
        engine.step()
    assert list(dict.fromkeys(said.speakers)) == [0, 1, 2, 3, 4]


def test_a_request_whose_adapter_has_no_place_waits_and_nobody_overtakes_it(model, engine_on):
    engine, said = engine_on(model, on_device=1), Said()
    for i, name in enumerate(["one", "two", "one"]):
        engine.submit(
            request_for([7], name, GenerationSettings(max_new_tokens=3), end_ids=(), tell=said.as_(i))
        )
    while engine.rows or engine.waiting:
        engine.step()
        assert len({row.request.adapter for row in engine.rows}) <= 1
    assert said.speakers == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_cancelled_request_frees_its_slot_at_the_next_step(model, engine_on):
    engine, said = engine_on(model, slots=1), Said()
    first, waits, second = (
        request_for([7, 8], "one", GenerationSettings(max_new_tokens=50), end_ids=(), tell=said.as_(i))
        for i in "abc"
    )
    for request in (first, waits, second):
        engine.submit(request)
    engine.step()
    first.cancel()
    waits.cancel()
    engine.step()
    assert [row.request for row in engine.rows] == [second] and not engine.waiting
    assert said.last("a").finish_reason == said.last("b").finish_reason == "cancelled"


def test_an_error_in_a_step_fails_its_requests_and_no_others(model, monkeypatch, capsys, engine_on):
    engine, said = engine_on(model), Said()
    read = SlotCache.read_tokens

    def failing(self, model, tokens):
        if 666 in tokens:
            raise RuntimeError("the kernel failed")
        return read(self, model, tokens)

    monkeypatch.setattr(engine_module.SlotCache, "read_tokens", failing)
    monkeypatch.setattr(
        engine_module,
        "next_tokens",
        lambda logits, samplers: [666 if s.penalty == 2 else 7 for s in samplers],
    )
    settings = GenerationSettings(max_new_tokens=4)
    for name in "xy":
        changed = replace(settings, repetition_penalty=2.0) if name == "x" else settings
        engine.submit(request_for([7], None, changed, end_ids=(), tell=said.as_(name)))
        engine.step()
    while engine.rows or engine.waiting:
        engine.step()
    assert said.last("x").error == "RuntimeError: the kernel failed"
    assert said.last("y").finish_reason == "length"
    assert engine.cache.lengths == [] and engine.counts.errors == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_tokenizer_that_breaks_fails_its_request_alone(model, engine_on, monkeypatch):
    engine, said = engine_on(model), Said()

    class Broken:
        def is_text(self, token):
            raise UserError("tokenizer.json: no such token")

    for name in ("one", "two"):
        request = request_for(
            [7], name, GenerationSettings(max_new_tokens=3), end_ids=(), tell=said.as_(name)
        )
        request.tokenizer = Broken() if name == "one" else request.tokenizer
        engine.submit(request)
    while engine.rows or engine.waiting:
        engine.step()
    assert said.last("one").error == "tokenizer.json: no such token"
    assert said.last("two").finish_reason == "length"


def test_an_adapter_that_cannot_be_loaded_fails_its_request_alone(model, monkeypatch, engine_on):
    engine, said = engine_on(model), Said()

    def use(names):
        if "two" in names:
            raise UserError("adapter_model.safetensors: damaged")

    monkeypatch.setattr(engine.store, "changes", lambda names: True)
    monkeypatch.setattr(engine.store, "use", use, raising=False)
    for name in ("one", "two", None):
        engine.submit(
            request_for([7], name, GenerationSettings(max_new_tokens=2), end_ids=(), tell=said.as_(name))
        )
    while engine.rows or engine.waiting:
        engine.step()
    assert said.last("two").error == "adapter_model.safetensors: damaged"
    assert said.last("one").finish_reason == said.last(None).finish_reason == "length"


def test_the_thread_survives_a_mistake_of_its_own(model, engine_on, monkeypatch, capsys):
    engine, said = engine_on(model), Said()
    admit, mistakes = engine._admit, iter([True])

    def mistaken():
        if next(mistakes, False):
            raise KeyError("nobody")
        return admit()

    monkeypatch.setattr(engine, "_admit", mistaken)
    for name in "ab":
        request = request_for([7], "one", GenerationSettings(max_new_tokens=1), tell=said.as_(name))
        engine.submit(request)
        if name == "a":
            engine.start()
        said.wait_for(name)
    assert said.last("a").error == "KeyError: 'nobody'" and said.last("b").error is None
    engine.stop()
    assert "KeyError" in capsys.readouterr().err


def test_a_full_queue_refuses_and_a_stopped_engine_too(model, engine_on):
    engine = engine_on(model, most_waiting=2)
    for _ in range(2):
        engine.submit(request_for([7], None))
    with pytest.raises(QueueFull):
        engine.submit(request_for([7], None))
    engine.stop()
    with pytest.raises(Stopped):
        engine.submit(request_for([7], None))
    with pytest.raises(Stopped):
        engine.call(lambda: None)


def test_the_thread_answers_calls_and_ends_with_a_bound(model, engine_on):
    engine, said = engine_on(model), Said()
    engine.start()
    endless = request_for([7], "one", GenerationSettings(max_new_tokens=90), end_ids=(), tell=said.as_("a"))
    engine.submit(endless)
    later = engine.call(lambda: len(engine.rows), adapter="one")  # once nobody uses it
    assert engine.call(lambda: "called").result(60) == "called"
    assert later.result(60) == 0 and said.last("a").finish_reason == "length"
    engine.submit(
        request_for([7], "one", GenerationSettings(max_new_tokens=90), end_ids=(), tell=said.as_("b"))
    )
    began = time.monotonic()
    engine.stop(0)
    assert said.last("b").error == "the server stops" and time.monotonic() - began < 30
    assert not engine.is_alive


def test_the_length_of_a_text_is_bounded_by_its_slot(model, engine_on):
    engine, said = engine_on(model, max_length=20), Said()
    engine.submit(
        request_for([7] * 15, None, GenerationSettings(max_new_tokens=50), end_ids=(), tell=said.as_("a"))
    )
    while engine.rows or engine.waiting:
        engine.step()
    assert said.last("a")[1:] == (5, "length", None)
