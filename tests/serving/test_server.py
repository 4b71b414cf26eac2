"""The server, asked by OpenAI's own client: answers are those that each adapter gives alone."""

import asyncio
import gc
import json
import random
import re
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from support.project import WORDS
from support.serving import BASE, TOKENIZER, save_adapters

from minilora import load_adapter, load_model
from minilora.data.chat import load_chat_template
from minilora.inference.assistant import Assistant, GenerationSettings
from minilora.inference.load import prepare_inference
from minilora.serving.server import Limits, load_app, running

openai = pytest.importorskip("openai", reason="the client that asks the server")
httpx = pytest.importorskip("httpx2", reason="it comes with openai")
NAMES = [f"a{i}" for i in range(8)]
KEY = "sk-of-this-test"
KEYS = ["--bf16", "false", "--template", "alpaca"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight random adapters, and one that stays there to be loaded later."""
    directory = tmp_path_factory.mktemp("served")
    save_adapters(directory, [*NAMES, "later"])
    (directory / "broken").mkdir()
    return directory


@pytest.fixture(scope="module")
def app(folder):
    setup = prepare_inference(None, [str(folder / name) for name in NAMES], KEYS)
    # More adapters than fit on the device, and than are kept in memory.
    limits = Limits(max_num_seqs=12, max_loras=5, max_cpu_loras=6)
    return load_app(setup, KEYS, "base", limits, api_key=KEY, adapter_dir=folder)


@pytest.fixture(scope="module")
def address(app):
    with running(app) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=address, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(address):
    """Requests that the client would not send."""
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


@pytest.fixture(scope="module")
def alone(folder):
    """The answer of an adapter as scripts/chat.py gives it: alone, in float32."""
    model = load_model(BASE, dtype=torch.float32)
    for name in NAMES:
        load_adapter(model, folder / name, name)
    model.eval()
    template = load_chat_template("alpaca", TOKENIZER)

    def answer(name, messages, **changes):
        adapter = None if name == "base" else name
        assistant = Assistant(model, TOKENIZER, template, GenerationSettings(**changes), adapter)
        return "".join(assistant.stream(messages))

    return answer


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def wait_until(condition, seconds=60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


# ---- what a client asks -------------------------------------------------------------------------------------


def test_a_chat_is_answered_as_the_adapter_answers_alone(client, alone):
    messages = [{"role": "system", "content": "Be brief."}, *user("the old fox")]
    messages += [{"role": "assistant", "content": "lives by the river"}, *user("and the owl")]
    said = {}
    for name in ("a2", "a3", "base"):
        answer = client.chat.completions.create(model=name, messages=messages, max_tokens=12, seed=5)
        said[name] = answer.choices[0].message.content
        assert said[name] == alone(name, messages, max_new_tokens=12, seed=5)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert len(set(said.values())) == 3


def test_what_a_request_leaves_out_is_as_in_chat_py(client, alone):
    answer = client.chat.completions.create(model="a1", messages=user("the mill"))
    assert answer.choices[0].message.content == alone("a1", user("the mill"))


def test_a_stream_has_the_same_text_and_says_why_it_ends(client, alone):
    asked = dict(model="a2", messages=user("a young owl"), max_completion_tokens=9, temperature=0)
    chunks = list(
        client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == alone("a2", asked["messages"], max_new_tokens=9, temperature=0)
    whole = client.chat.completions.create(**asked)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and not any(reasons[:-1])
    assert chunks[-1].usage == whole.usage and chunks[0].choices[0].delta.role == "assistant"


def test_completions_take_texts_and_token_ids(client):
    texts = ["the old fox", "a young owl live by"]
    asked = dict(
        model="a3", max_tokens=7, temperature=0.9, extra_body={"top_k": 0, "repetition_penalty": 1.2}
    )
    together = client.completions.create(prompt=texts, **asked)
    for i, text in enumerate(texts):
        (one,) = client.completions.create(prompt=TOKENIZER.encode(text), **asked).choices
        assert together.choices[i].text == one.text and together.choices[i].index == i
    parts = ["", ""]
    for chunk in client.completions.create(prompt=texts, stream=True, **asked):
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert parts == [choice.text for choice in together.choices]


def test_a_stop_string_ends_the_answer_before_it(client, alone):
    whole = alone("a4", user("the blue house"), max_new_tokens=20, temperature=0)
    stop = whole[len(whole) // 2 :][:3]
    asked = dict(
        model="a4", messages=user("the blue house"), max_tokens=20, temperature=0, stop=["never", stop]
    )
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.message.content == whole[: whole.index(stop)] and choice.finish_reason == "stop"
    chunks = client.chat.completions.create(stream=True, **asked)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content


def test_models_are_the_base_and_each_adapter_with_its_parent(client, folder):
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == ["base", *NAMES]
    assert listed["a0"].parent == "base" and listed["base"].parent is None
    assert listed["a0"].root == str(folder / "a0")
    assert [client.models.retrieve(name) for name in listed] == list(listed.values())
    with pytest.raises(openai.NotFoundError, match="nearest: 'a0'"):
        client.models.retrieve("a00")


def test_each_adapter_has_the_chat_template_of_its_own_run(folder, tmp_path, alone):
    for name, template in (("a2", "alpaca"), ("a3", "plain")):
        shutil.copytree(folder / name, tmp_path / name)
        (tmp_path / name / "training_config.yaml").write_text(
            f"template: {template}\nquantization_bit: none\n"
        )
    keys = ["--bf16", "false"]
    setup = prepare_inference(None, [str(tmp_path / "a2"), str(tmp_path / "a3")], keys)
    app = load_app(setup, keys, "base", Limits(max_num_seqs=2))
    templates = {name: served.template.name for name, served in app.models.by_name.items()}
    assert templates == {"base": "alpaca", "a2": "alpaca", "a3": "plain"}
    with running(app) as address, openai.OpenAI(base_url=address, api_key="none") as client:
        answer = client.chat.completions.create(model="a2", messages=user("the fox"), max_tokens=6)
        assert answer.choices[0].message.content == alone("a2", user("the fox"), max_new_tokens=6)


def test_two_hundred_streams_at_once_are_each_as_alone(address, alone):
    draw = random.Random(3)
    asked = [
        dict(
            model=draw.choice([*NAMES, "base"]),
            messages=user(" ".join(draw.choices(WORDS, k=draw.choice([1, 3, 9, 30])))),
            max_tokens=draw.choice([1, 3, 6, 10]),
            temperature=draw.choice([0.0, 0.7, 1.0]),
            seed=draw.randrange(100),
        )
        for _ in range(200)
    ]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=address, api_key=KEY, max_retries=0) as client:

            async def ask(body) -> str:
                stream = await client.chat.completions.create(stream=True, **body)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(ask, asked))

    for body, text in zip(asked, asyncio.run(ask_all()), strict=True):
        body["max_new_tokens"] = body.pop("max_tokens")
        assert text == alone(body.pop("model"), body.pop("messages"), **body)


# ---- what a client gets wrong -------------------------------------------------------------------------------

GOOD = dict(model="a0", messages=user("the fox"), max_tokens=2)
MISTAKES = {
    "a model that does not exist": (dict(model="a00"), openai.NotFoundError, "nearest: 'a0'"),
    "a prompt as long as the model": (dict(messages=user("fox " * 400)), openai.BadRequestError, "256 tokens"),
    "a field that would change the answer": (dict(logprobs=True), openai.BadRequestError, "logprobs = True"),
    "several answers": (dict(n=2), openai.BadRequestError, "n = 2 is not implemented"),
    "a penalty that is not there": (dict(presence_penalty=0.5), openai.BadRequestError, "presence_penalty"),
    "a field that nobody knows": (dict(extra_body=dict(temprature=0)), openai.BadRequestError, "nearest: 'temperature'"),
    "a temperature below 0": (dict(temperature=-1), openai.BadRequestError, "temperature must be 0"),
    "no room for a token": (dict(max_tokens=0), openai.BadRequestError, "max_tokens must be at least 1, not 0"),
    "a seed that is no number": (dict(seed="x"), openai.BadRequestError, "seed must be a whole number"),
    "an empty stop string": (dict(stop=[""]), openai.BadRequestError, "stop must be"),
    "no message": (dict(messages=[]), openai.BadRequestError, "at least one message"),
    "a role that nobody has": (dict(messages=[dict(role="tool", content="")]), openai.BadRequestError, "messages.0.role"),
    "a picture": (
        dict(messages=[dict(role="user", content=[dict(type="image_url", image_url=dict(url="x"))])]),
        openai.BadRequestError,
        "messages.0.content",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_an_error_of_the_client_that_names_it(client, mistake):
    changes, kind, words = MISTAKES[mistake]
    with pytest.raises(kind, match=words.replace("(", r"\(")):
        client.chat.completions.create(**GOOD | changes)


def test_fields_that_change_no_answer_are_ignored_and_parts_of_text_are_joined(client, alone):
    parts = [dict(type="text", text="the old fox"), dict(type="text", text="and an owl")]
    answer = client.chat.completions.create(
        **GOOD | dict(messages=user(parts)),
        user="me",
        store=False,
        n=1,
        logprobs=False,
        tools=[],
        presence_penalty=0,
    )
    assert answer.choices[0].message.content == alone("a0", user("the old fox\nand an owl"), max_new_tokens=2)


def test_a_key_is_required_and_never_shown(address, client):
    for key in ("sk-wrong", KEY[:-1], KEY + "x"):
        stranger = openai.OpenAI(base_url=address, api_key=key, max_retries=0)
        with stranger, pytest.raises(openai.AuthenticationError) as caught:
            stranger.models.list()
        assert KEY not in str(caught.value)
    assert httpx.get(f"{address}/models").status_code == 401
    assert httpx.get(f"{address[:-3]}/metrics").status_code == 401
    assert httpx.get(f"{address[:-3]}/health").json() == {"status": "ok"}


def test_bodies_have_limits_and_a_type(http):
    plain = http.post("/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415  # a browser sends this one to other sites without asking
    assert http.post("/completions", json=dict(model="a0", prompt="x" * (5 << 20))).status_code == 413
    assert http.get("/completions").status_code == 405 and http.get("/nothing").status_code == 404
    assert "there are /v1/chat/completions, " in http.post("/responses", json={}).json()["error"]["message"]


def test_a_body_that_does_not_come_is_given_up(address, monkeypatch):
    monkeypatch.setattr("minilora.serving.app.SECONDS", 0.2)
    with send(address, dict(model="a0"), cut=3) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "model messages prompt temperature top_p top_k seed max_tokens stop stream stream_options n logprobs "
    "repetition_penalty response_format lora_name lora_path"
).split()
FEW_TOKENS = dict(model="a0", messages=user("x"), prompt="x", max_tokens=1)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["chat/completions", "completions", "load_lora_adapter", "unload_lora_adapter"]),
    body=st.binary(max_size=60)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3).map(
        lambda changes: json.dumps(FEW_TOKENS | changes).encode()
    ),
)
def test_no_body_whatever_it_holds_is_an_error_of_the_server(http, app, path, body):
    if b'"max_tokens": null' in body:  # 512 tokens take long, and are no mistake
        body = body.replace(b'"max_tokens": null', b'"max_tokens": 1')
    answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert app.engine.is_alive and app.engine.counts.errors == 0


def test_a_full_queue_is_429_and_a_stopped_engine_503(app, client, monkeypatch):
    monkeypatch.setattr(app.engine, "most_waiting", 0)
    with pytest.raises(openai.RateLimitError, match="0 requests wait already"):
        client.chat.completions.create(**GOOD)
    monkeypatch.undo()
    monkeypatch.setattr(app.engine, "_stop_at", 1.0)
    with pytest.raises(openai.InternalServerError, match="the server stops"):
        client.chat.completions.create(**GOOD)


# ---- clients that leave, adapters that come and go ----------------------------------------------------------


def send(address: str, body: dict, cut: int = 0) -> socket.socket:
    """Send a request by hand, but for its last bytes, and return the open connection."""
    host, port = address.removeprefix("http://").removesuffix("/v1").split(":")
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(head.encode() + content[: len(content) - cut])
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots(app, address, client, monkeypatch, stream):
    slow = app.engine.cache.read_tokens

    def slowly(*arguments):
        time.sleep(0.02)
        return slow(*arguments)

    monkeypatch.setattr(app.engine.cache, "read_tokens", slowly)
    asked = dict(model="a0", prompt=["the"] * 12, max_tokens=250, stream=stream)
    # No token ends these answers: each takes five seconds.
    monkeypatch.setitem(app.models.by_name, "a0", endless(app.models.by_name["a0"]))
    connection = send(address, asked)
    wait_until(lambda: len(app.engine.rows) == 12)
    steps = app.engine.counts.steps
    connection.close()
    wait_until(lambda: not app.engine.rows)
    assert app.engine.counts.steps - steps < 200  # of 249 that the answers would have taken
    assert client.chat.completions.create(**GOOD).choices


def endless(served):
    return SimpleNamespace(**vars(served) | dict(end_ids=frozenset()))


def test_adapters_come_and_go_while_others_answer(app, address, client, http, alone, folder, capsys):
    with ThreadPoolExecutor(4) as pool:
        asked = dict(messages=user("the river"), max_tokens=30, temperature=0)
        others = [pool.submit(client.chat.completions.create, model=f"a{i % 8}", **asked) for i in range(16)]
        said = set()
        for _ in range(3):
            loaded = http.post("/load_lora_adapter", json=dict(lora_name="new", lora_path="later"))
            assert loaded.status_code == 200, loaded.text
            answering = pool.submit(client.chat.completions.create, model="new", **asked)
            wait_until(
                lambda done=answering.done: (
                    done() or "new" in [row.request.adapter for row in app.engine.rows]
                )
            )
            assert http.post("/unload_lora_adapter", json=dict(lora_name="new")).status_code == 200
            said.add(answering.result().choices[0].message.content)  # it still got its whole answer
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model="new", **asked)
        expected = [alone(f"a{i}", asked["messages"], max_new_tokens=30, temperature=0) for i in range(8)]
        assert [other.result().choices[0].message.content for other in others] == expected * 2
        lines = [f"loaded new from {str(folder / 'later')!r}", "unloaded new"]
        assert capsys.readouterr().err.splitlines() == lines * 3
        assert len(said) == 1 and not said & set(expected)


@pytest.mark.parametrize(
    "asked, words",
    [
        (dict(lora_name="x", lora_path="../"), "no folder within"),
        (dict(lora_name="x", lora_path="/"), "no folder within"),
        (dict(lora_name="x", lora_path="https://example.com/a"), "no folder within"),
        (dict(lora_name="x", lora_path="owner/model"), "no folder within"),
        (dict(lora_name="x", lora_path="out"), "no folder within"),
        (dict(lora_name="x", lora_path="broken"), "adapter_config.json"),
        (dict(lora_name="a.b", lora_path="a1"), "lora_name = 'a.b' must be"),
        (dict(lora_name="keys", lora_path="a1"), "keys"),
        (dict(lora_name="a1", lora_path="a2"), "loaded already"),
        (dict(lora_name="base", lora_path="a2"), "loaded already"),
        (dict(lora_name="x"), "lora_path must be a text"),
        (dict(lora_name="x", lora_path="a2", load_inplace=True), "load_inplace is not known here"),
    ],
)
def test_a_client_loads_adapters_from_one_directory_only(http, app, folder, asked, words):
    if not (folder / "out").exists():
        (folder / "out").symlink_to(folder.parent)
    answer = http.post("/load_lora_adapter", json=asked)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]
    assert list(app.models.by_name) == ["base", *NAMES] == ["base", *app.engine.store.names]


def test_an_adapter_that_is_broken_on_the_disk_fails_its_requests_alone(app, client, folder, capsys):
    for name in NAMES:  # the first of them is in memory no more
        client.chat.completions.create(**GOOD | dict(model=name))
    weights = folder / "a0" / "adapter_model.safetensors"
    good = weights.read_bytes()
    try:
        weights.write_bytes(good[:100])
        with pytest.raises(openai.InternalServerError, match="a0"):
            client.chat.completions.create(**GOOD)
        assert client.chat.completions.create(**GOOD | dict(model="a7")).choices
    finally:
        app.engine.counts.errors = 0
        weights.write_bytes(good)
        app.engine.call(lambda: app.engine.store.forget("a0")).result(60)
        app.engine.call(lambda: app.engine.store.register("a0", folder / "a0")).result(60)
    assert client.chat.completions.create(**GOOD).choices


def test_answers_that_outlast_the_grace_end_with_503_and_without_a_traceback(folder, monkeypatch, capfd):
    setup = prepare_inference(None, [str(folder / "a0")], KEYS)
    app = load_app(setup, KEYS, "base", Limits(max_num_seqs=2), grace=0.2)
    app.models.by_name["a0"] = endless(app.models.by_name["a0"])
    quickly = app.engine.cache.read_tokens
    slowly = lambda *given: time.sleep(0.1) or quickly(*given)  # noqa: E731  25 seconds for 250 tokens
    monkeypatch.setattr(app.engine.cache, "read_tokens", slowly)
    asked = dict(model="a0", prompt="the", max_tokens=250)
    with ThreadPoolExecutor(2) as pool, running(app) as address:
        bodies = [asked, asked | dict(stream=True)]
        whole, stream = [
            pool.submit(httpx.post, f"{address}/completions", json=body, timeout=60) for body in bodies
        ]
        wait_until(lambda: len(app.engine.rows) == 2)
    assert (
        whole.result().status_code == 503 and "the server stops" in whole.result().json()["error"]["message"]
    )
    assert "the server stops" in stream.result().text.splitlines()[-2]
    err = capfd.readouterr().err
    assert "stopping when all answers (2) have ended, at most 0.2 s" in err and "Traceback" not in err


# ---- what is left behind ------------------------------------------------------------------------------------


def test_hundreds_of_requests_leave_nothing_behind(app, client):
    def ask(n: int) -> None:
        with ThreadPoolExecutor(16) as pool:
            for answer in pool.map(
                lambda i: client.completions.create(model=f"a{i % 5}", prompt="the", max_tokens=2), range(n)
            ):
                assert answer.usage.completion_tokens

    def tensors() -> int:
        wait_until(lambda: not app.engine.rows)
        app.engine.call(lambda: None).result(60)  # takes the last mixture off the model
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    ask(50)
    before = tensors()
    ask(250)
    assert tensors() == before  # the five adapters are the same
    assert app.engine.cache.lengths == [] and not app.engine.waiting and not app.engine.jobs


def test_metrics_count_what_was_asked(app, http, client):
    def metric(name: str) -> float:
        text = http.get(http.base_url.join("/metrics")).text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    names = ["minilora_prompt_tokens_total", "minilora_generation_tokens_total"]
    names += [
        'minilora_requests_total{model="a1",outcome="length"}',
        "minilora_time_to_first_token_seconds_count",
    ]
    refused = 'minilora_requests_total{model="a1",outcome="refused"}'
    before = [metric(name) for name in [*names, refused]]
    usage = client.completions.create(model="a1", prompt=["the fox", "the"], max_tokens=1).usage
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="a1", prompt="the", logprobs=3)
    grown = [metric(name) - old for name, old in zip([*names, refused], before, strict=True)]
    assert grown == [usage.prompt_tokens, usage.completion_tokens, 2, 2, 1]
    assert metric("minilora_slots") == 12 and metric('minilora_adapters{place="device"}') <= 5


def test_every_metric_says_what_it_counts(http):
    text = http.get(http.base_url.join("/metrics")).text
    families = list(text_string_to_metric_families(text))
    assert len(families) > 15
    for family in families:
        assert re.fullmatch(r"[A-Z].{10,}\.", family.documentation), family.name


def test_without_a_key_only_names_of_this_machine_are_answered(folder):
    setup = prepare_inference("assets/base", [], ["--bf16", "false"])
    app = load_app(setup, [], limits=Limits(max_num_seqs=1))
    with running(app) as address:
        for host, status in (
            ("localhost:1", 200),
            ("127.0.0.1", 200),
            ("[::1]:80", 200),
            ("evil.example", 403),
        ):
            assert httpx.get(f"{address}/models", headers={"Host": host}).status_code == status
        assert (
            httpx.post(f"{address}/load_lora_adapter", json=dict(lora_name="x", lora_path="y")).status_code
            == 403
        )
