"""Addresses: of schemes that nobody should follow, malformed ones, and ones that hold a credential."""

from collections.abc import Iterator

from fuzz.bad_inputs.commands import CHAT, COMPARE, EVALUATE, LINT, MEMORY, MERGE, PREPARE, SHARE, TRAIN
from fuzz.case import Case, make_case
from fuzz.edits import set_keys

KIND = "address"
SECRET = "hunter2secret"
SCHEMES = {  # address: a word of it
    "file:///etc/passwd": "file",
    "file:///etc/passwd.jsonl": "file",
    "FILE:///etc/passwd.jsonl": "passwd",
    "local:///etc/passwd.jsonl": "local",
    "ftp://127.0.0.1/rows.jsonl": "ftp",
    "gopher://127.0.0.1/rows.jsonl": "gopher",
    "memory://rows.jsonl": "memory",
    "data://text/plain,rows.jsonl": "data",
    "reference::https://127.0.0.1/rows.jsonl": "reference",
    "simplecache::https://127.0.0.1/rows.jsonl": "simplecache",
    "simplecache::file:///etc/passwd.jsonl": "simplecache",
    "zip://rows.jsonl::https://127.0.0.1/a.zip": "zip",
    "github://owner:name@/rows.jsonl": "github",
    "smb://127.0.0.1/rows.jsonl": "smb",
    "ssh://127.0.0.1/rows.jsonl": "ssh",
    "hdfs://127.0.0.1/rows.jsonl": "hdfs",
    "javascript://rows.jsonl": "javascript",
    "://rows.jsonl": "rows.jsonl",
    "https://": "https",
    "https:///rows.jsonl": "https",
    "https://[::1/rows.jsonl": "https",
    "https://127.0.0.1:99999/rows.jsonl": "https",
    "https://127.0.0.1:port/rows.jsonl": "https",
    "https://a b/rows.jsonl": "https",
    "https://127.0.0.1/\r\nHost: x/rows.jsonl": "https",
    "https://127.0.0.1/\x1b[2Jrows.jsonl": "rows.jsonl",
    "s3://": "s3",
    "s3:///rows.jsonl": "s3",
    f"ftp://127.0.0.1/{'x' * 100_000}.jsonl": "ftp",
}  # fmt: skip
WITH_SECRETS = {  # name: a malformed or refused address that holds the secret
    "a password": f"ftp://user:{SECRET}@127.0.0.1/rows.jsonl",
    "a password before an open bracket": f"https://user:{SECRET}@[::1/rows.jsonl",
    "a password and a wrong port": f"https://user:{SECRET}@127.0.0.1:99999/rows.jsonl",
    "a signature": f"ftp://127.0.0.1/rows.jsonl?X-Amz-Signature={SECRET}",
    "a password in a chain": f"simplecache::https://user:{SECRET}@127.0.0.1/rows.jsonl",
    "a password with a slash": f"ftp://user:{SECRET}/x@127.0.0.1/rows.jsonl",
    "a password with an @": f"ftp://user:x@{SECRET}@127.0.0.1/rows.jsonl",
    "a fragment": f"ftp://127.0.0.1/rows.jsonl#{SECRET}",
}
READERS = {  # a command that ends where an address is to follow
    "dataset": "train --model model --output_dir out --dataset",
    "prepare": "prepare --model model --output out --dataset",
    "eval_dataset": f"{TRAIN} --val_size 0 --eval_dataset",
    "model": "train --dataset train.jsonl --output_dir out --model",
    "adapter": "evaluate --dataset train.jsonl --adapter",
    "evaluate": "evaluate --adapter adapter --dataset",
    "chat": "chat --instruction say --adapter",
    "input": "chat --adapter adapter --output answers.jsonl --input",
    "merge": "merge --output out --adapter",
    "serve": "serve --port 0 --dry_run --adapter",
    "memory": "memory --model",
    "lint": "lint_adapter",
}
LOCAL_ONLY = {  # a command that ends where a path of this machine is to follow: the option's name
    f"{TRAIN} --output_dir": "output_dir",
    "train --config": "config",
    f"{TRAIN} --resume_from_checkpoint": "resume_from_checkpoint",
    "prepare --model model --dataset train.jsonl --output": "output",
    f"{EVALUATE} --output": "output",
    "chat --adapter adapter --input questions.jsonl --output": "output",
    "merge --adapter adapter --output": "output",
    "merge --adapter adapter --export_adapter": "output|export_adapter",
    f"{MEMORY} --picture": "picture",
    f"{COMPARE} --output": "output",
    f"{COMPARE} --html": "html",
    "serve --adapter adapter --port 0 --dry_run --adapter_dir": "adapter_dir",
    "compare": "s3|directory",
    "sweep --config": "config",
    "train_together": "config|settings|SETTINGS",
    "share --push_to_hub owner/name --adapter": "adapter",
    "bench --output": "output",
    "verify --output": "output",
    "pretrain --steps 1 --output": "output",
    "pictures --output": "output",
    "notebooks --output": "output",
    "check_gpu --out": "out",
    "check_gpu --table": "table",
    "experiments rank_and_rate --output": "output",
}
UPLOADS = {  # value of an option that receives files: a word
    "bucket/folder": "bucket/folder",
    "file:///tmp/pwned": "file",
    "memory://pwned": "memory",
    "ftp://127.0.0.1/x": "ftp",
    "https://127.0.0.1/x": "https",
    "simplecache::s3://bucket/x": "simplecache",
    "s3://": "s3",
    "s3://[x/y": "s3",
    f"s3://user:{SECRET}@bucket/x": "s3",
    f"s3://bucket/x?signature={SECRET}": "s3",
    f"s3://{SECRET}@bucket/x": "s3",
}
REPOSITORIES = (
    "nobody",
    "a/b/c",
    "../x",
    "owner/",
    "/name",
    "owner/na me",
    "https://huggingface.co/owner/name",
    "-/-",
)


def cases() -> Iterator[Case]:
    readers = list(READERS.items())
    for number, (address, word) in enumerate(SCHEMES.items()):
        for key, command in (readers[0], readers[1 + number % (len(readers) - 1)]):
            yield make_case(KIND, f"{key}: {address[:60]!a}", [*command.split(), address], word)
    for name, address in WITH_SECRETS.items():
        for key, command in readers:
            words = [*command.split(), address]
            yield make_case(KIND, f"{key}: {name}", words, "127.0.0.1|://", secret=SECRET)
    for command, option in LOCAL_ONLY.items():
        words = [*command.split(), f"s3://user:{SECRET}@bucket/x"]
        yield make_case(KIND, f"{words[0]}: a path is needed ({option})", words, option, secret=SECRET)
    for command, key in ((TRAIN, "upload"), (PREPARE, "to"), ("share --adapter adapter", "upload")):
        for address, word in UPLOADS.items():
            words = [*command.split(), f"--{key}", address]
            yield make_case(KIND, f"{words[0]}: --{key} {address}", words, word, secret=SECRET)
    for name in REPOSITORIES:
        command = ["share", "--adapter", "adapter", "--push_to_hub", name]
        yield make_case(KIND, f"share: --push_to_hub {name}", command, f"{name}|push_to_hub")
    yield make_case(KIND, "share: the hub is switched off", SHARE, "HF_HUB_OFFLINE")
    for name in ("mlflow_tracking_uri", "run_name"):
        address = f"https://user:{SECRET}@[::1"
        words = [*TRAIN.split(), f"--{name}", address, "--report_to", "mlflow", "--model", "absent"]
        yield make_case(KIND, f"train: a secret in {name}, and no model", words, "absent", secret=SECRET)
    yield from _bases()


def _bases() -> Iterator[Case]:
    """An adapter names its base model. If it names an address, only the user may follow it."""
    bases = (
        *SCHEMES,
        *WITH_SECRETS.values(),
        "s3://bucket/model",
        "hf://owner/name",
        "https://127.0.0.1/model",
    )
    commands = (EVALUATE, CHAT, MERGE)
    for number, address in enumerate(bases):
        command = commands[number % 3]
        change = set_keys("adapter/adapter_config.json", base_model_name_or_path=address)
        title = f"{command.split()[0]}: the adapter's base is {address[:60]!a}"
        secret = SECRET if SECRET in address else None
        said = "--model" if address.isprintable() and len(address) <= 1000 else "base_model_name_or_path"
        yield make_case(KIND, title, command, said, change=change, secret=secret)
    yield make_case(
        KIND,
        "lint_adapter: --model is a pipe's address",
        f"{LINT[: LINT.index(' --model')]} --model file:///dev/zero",
        "file",
    )
