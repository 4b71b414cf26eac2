"""scripts/serve.py: one line when it is ready, a bounded end at a signal, and one line for every mistake."""

import json
import signal
import socket
import subprocess
import sys

import pytest
from support.project import PROGRAM_ENVIRONMENT, ROOT
from support.serving import save_adapters

from minilora.serving.sizes import FEWEST, SLOTS, choose_sizes

httpx = pytest.importorskip("httpx2", reason="it comes with huggingface_hub")
pytest.importorskip("uvicorn", reason="an extra: serve")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    save_adapters(directory, ["one", "two"])
    return directory


@pytest.fixture
def serve(call, monkeypatch):
    """Run `serve.py ARGUMENTS --dry_run`: (exit code, stdout, stderr)."""
    monkeypatch.delenv("MINILORA_API_KEY", raising=False)
    return lambda *arguments: call("serve", "--port", "0", "--dry_run", *arguments)


def test_a_dry_run_says_what_would_be_served(serve, folder):
    two = f"sql={folder / 'two'}"
    words = "--max_num_seqs 3 --bf16 false".split()
    code, out, err = serve("--adapter", folder / "one", "--adapter", two, *words)
    assert code == 0 and out == "would serve assets/base, one, sql\n"
    # float32: 2 * 4 layers * 2 heads * 256 tokens * 32 numbers * 4 bytes * 3 slots = 1.5 MiB
    assert "3 answers at once, of 256 tokens with their prompts: 1.5 MiB for keys and values" in err


def test_the_base_is_called_as_the_user_names_it(serve):
    assert serve("--model", "assets/base", "--served_model_name", "tiny")[1] == "would serve tiny\n"
    assert serve("--model", "assets/base")[1] == "would serve assets/base\n"


@pytest.mark.parametrize(
    "words, error",
    [
        ("--max_num_seqs 0", "max_num_seqs must be at least 1 and at most 16777216, not 0"),
        ("--max_model_len 300", "max_model_len = 300 is more than the 256 positions of the model"),
        ("--max_loras 9 --max_cpu_loras 8", "max_cpu_loras = 8 is less than max_loras = 9"),
        ("--grace -1", "--grace must be from 0 to 3600 seconds, not -1"),
        ("--adapter_dir nowhere", "--adapter_dir 'nowhere' is no directory"),
        ("--temperature -1", "temperature must be 0"),
        ("--host nowhere.invalid", "--host nowhere.invalid --port 0"),
        ("--served_model_name one", "'one' is the name of an adapter and of the base model"),
        ("--max_num_seqs 16000000", "do not fit into the"),
    ],
)
def test_a_mistake_ends_in_one_line_that_names_it(serve, folder, words, error):
    code, _, err = serve("--adapter", folder / "one", *words.split())
    assert code == 2 and error in err.splitlines()[-1]


def test_a_dry_run_warns_of_a_server_for_everyone(serve):
    _, out, err = serve("--model", "assets/base", "--host", "0.0.0.0")
    assert "whoever reaches 0.0.0.0 may ask, as there is no key; set MINILORA_API_KEY" in err


def test_a_key_is_never_printed(serve, folder, monkeypatch):
    monkeypatch.setenv("MINILORA_API_KEY", "sk with blanks")
    code, out, err = serve("--adapter", folder / "one")
    assert code == 2 and "holds a blank" in err and "sk with" not in out + err


def test_a_port_in_use_is_one_line(call):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = call("serve", "--model", "assets/base", "--port", port, "--dry_run")
    assert (
        code == 2
        and err == f"error: --host 127.0.0.1 --port {port}: Address already in use; choose another one\n"
    )


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "prometheus_client"])
def test_without_the_extra_one_line_says_how_to_install_it(serve, monkeypatch, package):
    for name in [name for name in sys.modules if name.startswith(("minilora.serving.", package))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = serve("--model", "assets/base")
    assert code == 2 and err.endswith(
        f"needs the package {package}, which is missing: pip install 'minilora[serve]'\n"
    )


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_running_answers_end_and_takes_no_more(folder, number, code):
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--adapter", folder / "one", "--port", "0"]
    environment = PROGRAM_ENVIRONMENT | {"MINILORA_API_KEY": "sk-secret"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as program:
        ready = program.stdout.readline()
        address = ready.partition(" ")[0]
        assert ready == f"{address} serves assets/base, one\n"
        asked = dict(
            model="one", prompt=["the"] * 4, max_tokens=200, temperature=1.5, top_k=0, top_p=1, stream=True
        )
        headers, events = {"Authorization": "Bearer sk-secret"}, []
        with httpx.stream(
            "POST", f"{address}/completions", json=asked, headers=headers, timeout=60
        ) as answer:
            for line in filter(None, answer.iter_lines()):
                if not events:
                    program.send_signal(number)
                events.append(line)
        out, err = program.communicate(timeout=60)
    assert program.returncode == code and out == ""
    assert events[-1] == "data: [DONE]" and len(events) > 100
    ends = [json.loads(line[6:])["choices"][0] for line in events[:-1]]
    assert sorted(end["index"] for end in ends if end["finish_reason"]) == [0, 1, 2, 3]
    assert "sk-secret" not in err and err.splitlines()[-1] in ("interrupted", "ended by SIGTERM")


def test_a_second_ctrl_c_ends_the_grace_and_every_client_is_told(folder):
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--adapter", folder / "one", "--port", "0"]
    with subprocess.Popen(
        [*command, "--grace", "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=PROGRAM_ENVIRONMENT,
    ) as program:
        address = program.stdout.readline().partition(" ")[0]
        asked = dict(model="one", prompt=["the"] * 16, max_tokens=250, temperature=1.5, stream=True)
        with httpx.stream("POST", f"{address}/completions", json=asked, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            program.send_signal(signal.SIGINT)
            while "stopping when all answers (16) have ended, at most 60 s" not in program.stderr.readline():
                pass
            program.send_signal(signal.SIGINT)
            events = [line for line in lines if line]
        _, err = program.communicate(timeout=60)
    assert program.returncode == 130 and err == "interrupted\n"
    assert json.loads(events[-1][6:])["error"]["message"] == "the server stops"


def test_sizes_shrink_until_they_fit():
    import torch
    from support.tiny import tiny_model

    config = tiny_model(max_position_embeddings=4096).config
    whole = choose_sizes(config, torch.float32, "cpu", None)
    assert (whole.slots, whole.max_length) == (SLOTS, 4096)
    # 2 * 2 layers * 2 heads * 6 numbers * 4 bytes a token
    assert whole.cache == 16 * 4096 * 192
    free = range(5 << 19, 40 << 20, 1 << 18)
    room = [choose_sizes(config, torch.float32, "cpu", bytes_) for bytes_ in free]
    assert all(1.1 * (s.cache + s.work) <= bytes_ for s, bytes_ in zip(room, free, strict=True))
    chosen = [(sizes.max_length, sizes.slots) for sizes in room]
    assert chosen[-1] == (4096, SLOTS) and len({length for length, _ in chosen}) > 2
    assert all(slots >= FEWEST for length, slots in chosen if length > 64)
