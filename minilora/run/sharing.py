"""Share a run's results: in a repository on the Hugging Face hub, and at any address that fsspec can write.

    --push_to_hub owner/name       one commit each time; a missing repository is created, and is private with
                                   --hub_private_repo true
    --upload s3://bucket/folder    file by file; each arrives in full or not at all

The trainer sends the settings before its first step, so a missing permission stops the run at its start and
not after a night of training. Checkpoints are not shared, because only this run can use them. A save that
cannot be shared in the middle of a run only prints a warning. The end of the run is the last attempt; after
that, `scripts/share.py` sends the results again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from minilora.adapters.peft_format import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from minilora.data.tokenizer import TOKENIZER_FILES
from minilora.run.output_dir import KEPT_HERE, MODEL_FILES, RUN_FILES, SETTINGS_FILE
from minilora.run.tracker import METRICS_FILE
from minilora.system.errors import UserError, summarize
from minilora.system.hub import push_files
from minilora.system.redaction import Address, without_secrets
from minilora.system.remote import check_address, write_files

_TEXTS = {SETTINGS_FILE, METRICS_FILE, ADAPTER_CONFIG_FILE, "README.md"}
Files = Mapping[str, Path | bytes]  # {name: path or content}


class Destination(Protocol):
    """A receiver of files. `send` returns their address, or raises UserError."""

    def send(self, files: Files, message: str) -> str: ...


@dataclass(frozen=True)
class HubRepository:
    """A model repository on the hub."""

    repo_id: str
    private: bool = False

    def send(self, files: Files, message: str) -> str:
        """Commit the files, with `message`. Returns the repository's address."""
        return push_files(self.repo_id, files, message, self.private)


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at an address."""

    address: str

    def send(self, files: Files, message: str) -> str:
        """Write the files; `message` is not kept. Returns the address without credentials."""
        write_files(self.address, files)
        return str(Address(self.address))


def make_destinations(push_to_hub: str | None, private: bool, upload: str | None) -> list[Destination]:
    """Return the destinations that are set.

    Raises UserError if `upload` is not an address or holds a password.
    """
    chosen: list[Destination] = []
    if push_to_hub:
        chosen.append(HubRepository(push_to_hub, private))
    if upload:
        check_address("upload", upload)
        chosen.append(RemoteFolder(upload))
    return chosen


def files_to_share(directory: Path, adapter: Path | None = None) -> dict[str, Path | bytes]:
    """A run's results as {name: path or content}: adapter or model, tokenizer, settings, metrics, plots.

    `adapter` is the directory of the adapter, if not `directory` itself. Checkpoints and answers are left
    out. So are secrets in the texts, which a run of an older version or of another program may have written
    there.
    """
    trained = adapter or directory
    is_adapter = (trained / ADAPTER_CONFIG_FILE).is_file()
    kind = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE) if is_adapter else MODEL_FILES
    names = [name for name in (*RUN_FILES, *TOKENIZER_FILES) if (directory / name).is_file()]
    names = [name for name in names if name not in KEPT_HERE]
    files: dict[str, Path | bytes] = {name: directory / name for name in names}
    files |= {name: trained / name for name in kind if adapter or (trained / name).is_file()}
    for name in _TEXTS & files.keys():
        text = files[name].read_text(encoding="utf-8", errors="surrogateescape")
        if (shown := without_secrets(text)) != text:
            files[name] = shown.encode("utf-8", "surrogateescape")
    return files


def send_to_all(destinations: Sequence[Destination], files: Files, message: str) -> None:
    """Send files to every destination and print their addresses.

    Every destination is tried. Then UserError is raised, with all failures, if there were any.
    """
    failures = []
    for destination in destinations:
        try:
            print(f"sent to {destination.send(files, message)}", flush=True)
        except UserError as error:
            failures.append(str(error))
    if failures:
        raise UserError(summarize(failures))
