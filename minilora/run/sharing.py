"""Where results go that others are to have: a repository on the Hugging Face hub, and any address that fsspec
can write.

    --push_to_hub owner/name          made if need be, private with --hub_private_repo true; each time one commit
    --upload s3://bucket/folder       file by file, each of them whole or not there

A run's settings go there before its first step: who may not write learns it then, and not after a night of
training. Checkpoints stay at home, for they are of use to this run alone. A save that cannot be shared in the
middle of a run is a warning; the end of the run is the last try, and after that there is `scripts/share.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from minilora.data.tokenizer import TOKENIZER_FILES
from minilora.formats.adapter import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from minilora.run.output_dir import RUN_FILES, SETTINGS_FILE
from minilora.run.reporters import without_secrets
from minilora.system.errors import UserError, summarize
from minilora.system.hub import push_files
from minilora.system.remote import check_address, redacted, write_files

Files = Mapping[str, Path | bytes]  # name -> where it lies, or what is in it


class Destination(Protocol):
    """Somewhere files are sent to, all under their names. `send` returns where they are, and raises
    UserError.
    """

    def send(self, files: Files, message: str) -> str: ...


@dataclass(frozen=True)
class HubRepository:
    """A model repository on the hub."""

    repo_id: str
    private: bool = False

    def send(self, files: Files, message: str) -> str:
        """Commit the files."""
        return push_files(self.repo_id, files, message, self.private)


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at an address."""

    address: str

    def send(self, files: Files, message: str) -> str:
        """Write the files. Nothing keeps a message there."""
        write_files(self.address, files)
        return redacted(self.address)


def destinations(push_to_hub: str | None, private: bool, upload: str | None) -> list[Destination]:
    """Those that are named. Raises UserError for an address that is none, or that holds a password."""
    found: list[Destination] = [HubRepository(push_to_hub, private)] if push_to_hub else []
    if upload:
        check_address("upload", upload)
        found.append(RemoteFolder(upload))
    return found


def files_to_share(directory: Path, adapter: Path | None = None) -> dict[str, Path | bytes]:
    """What a run's directory holds for others: adapter, tokenizer, settings, metrics, pictures, model card;
    no checkpoints.

    `adapter`: where the adapter lies, if it is not this directory's own. Addresses in the settings are sent
    without passwords.
    """
    names = [name for name in (*RUN_FILES, *TOKENIZER_FILES) if (directory / name).is_file()]
    files: dict[str, Path | bytes] = {name: directory / name for name in names}
    if adapter is not None:
        files |= {name: adapter / name for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE)}
    if SETTINGS_FILE in files:
        files[SETTINGS_FILE] = without_secrets(
            (directory / SETTINGS_FILE).read_text(encoding="utf-8")
        ).encode()
    return files


def send_to_all(found: Sequence[Destination], files: Files, message: str) -> None:
    """Send files everywhere and print where they are. Raises UserError for those that failed, after all have
    been tried.
    """
    failures = []
    for destination in found:
        try:
            print(f"sent to {destination.send(files, message)}", flush=True)
        except UserError as error:
            failures.append(str(error))
    if failures:
        raise UserError(summarize(failures))
