"""A tiny model directory, a small dataset, and a way to run the trainer as the command line does."""

import importlib
import io
import json
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import settings
from support.merging import make_adapter, make_base
from support.project import WORDS
from support.servers import S3_SECRET
from support.tiny import randomize

from minilora import CausalLM, LoraConfig, add_lora, load_model, save_adapter, save_model
from minilora.formats.config_json import parse_config
from minilora.system.device import Placement
from minilora.system.errors import run_script

settings.register_profile("minilora", deadline=None)  # A busy machine is no fault of the code.
settings.load_profile("minilora")

# Under nohup the programs that the tests start would not hear a hangup. The tests go on without a terminal.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A random Llama of 130,000 parameters with a byte-fallback sentencepiece vocabulary of 320 pieces."""
    directory = tmp_path_factory.mktemp("model")
    text = directory / "text.txt"
    text.write_text("\n".join(" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    text.unlink()
    size = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model")).vocab_size()
    config = dict(
        model_type="llama", vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=2
    )
    config |= dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=256,
    )
    model = CausalLM(parse_config(config))
    model.init_weights(std=0.1)
    save_model(model, directory)
    return directory


@pytest.fixture(scope="session")
def examples() -> list[dict]:
    """Prompts with completions of 1 to 17 words: very different lengths."""
    return [
        {
            "prompt": f"say {' '.join(WORDS[i % 7 : i % 7 + 3])}:",
            "completion": " ".join(WORDS[: 1 + i * 7 % 17]),
        }
        for i in range(24)
    ]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, examples) -> Path:
    """The examples as a JSONL file."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


@pytest.fixture(scope="session")
def trainer():
    """scripts/train.py as a module."""
    import train

    return train


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script as the command line does, but in this process, with lines typed: (exit code, stdout,
    stderr).
    """

    def run(name: str, *arguments: object, typed: str = "") -> tuple[int, str, str]:
        script = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        try:
            run_script(script.main)
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def run_trainer(call):
    """Run `train.py ARGUMENTS`: (exit code, stdout, stderr)."""
    return partial(call, "train")


@pytest.fixture
def train(run_trainer, model_dir, dataset, tmp_path):
    """Train the tiny model into tmp_path/NAME; fails the test if the trainer does. Returns the directory and
    what was printed.
    """

    def run(name="out", code=0, **keys):
        keys = {
            "model": model_dir,
            "dataset": dataset,
            "output_dir": tmp_path / name,
            "max_steps": 4,
            "lora_dropout": 0,
            "quantization_bit": "none",
        } | keys
        words = (word for key, value in keys.items() if value is not None for word in (f"--{key}", value))
        ended, out, err = run_trainer(*words)
        assert ended == code, err
        return (tmp_path / name, out) if code != 2 else (tmp_path / name, err)

    return run


@pytest.fixture(scope="session")
def s3_server():
    """moto's S3 server on loopback, with one bucket, called bucket; its address."""
    pytest.importorskip("s3fs", reason="an extra: S3")
    server = pytest.importorskip("moto.server", reason="an S3 server").ThreadedMotoServer(
        "127.0.0.1", 0, verbose=False
    )
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch, tmp_path):
    """The environment in which s3:// is that server, and one empty bucket; a function that lists the names in
    it.
    """
    import boto3
    import s3fs

    for name, value in dict(
        AWS_ENDPOINT_URL=s3_server, AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY=S3_SECRET, AWS_DEFAULT_REGION="us-east-1",
        AWS_CONFIG_FILE=str(tmp_path / "none"), AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "none"), NO_PROXY="127.0.0.1",
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    ).items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # its clients remember the environment
    bucket = boto3.resource("s3").Bucket("bucket")
    bucket.create()
    bucket.objects.all().delete()
    return lambda: sorted(entry.key for entry in bucket.objects.all())


@pytest.fixture
def in_float16(monkeypatch):
    """Make the trainer compute in float16 on this CPU, which it refuses its users, with a given loss scale."""
    placement = Placement(torch.device("cpu"), torch.float16, "a test")

    def choose(scale=2.0**16):
        scaler = torch.amp.GradScaler
        monkeypatch.setattr("minilora.run.plan.choose_placement", lambda *_: placement)
        monkeypatch.setattr(
            torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=scale, enabled=enabled)
        )

    return choose


@pytest.fixture
def merge(call):
    """Run `merge.py ARGUMENTS`: (exit code, stdout, stderr)."""
    return partial(call, "merge")


@pytest.fixture
def place(tmp_path, model_dir):
    """A base model in `base`, a random rsLoRA adapter on five kinds of layers in `adapter`; two kinds have none."""
    make_base(tmp_path / "base", model_dir)
    make_adapter(tmp_path / "base", tmp_path / "adapter")
    return tmp_path


@pytest.fixture(scope="session")
def adapters(tmp_path_factory, model_dir):
    """Two random adapters on different layers, `one` and `two`."""
    directory = tmp_path_factory.mktemp("adapters")
    for name, targets in (("one", ["q_proj", "down_proj"]), ("two", ["v_proj"])):
        model = load_model(model_dir, dtype=torch.float32)
        add_lora(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        randomize(model)
        save_adapter(model, directory / name, base_model_name_or_path=str(model_dir))
    return directory
