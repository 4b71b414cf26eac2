"""A model by its place: a local directory, or an id on the Hugging Face hub.

    resolve_model("out/adapter")                  a directory that is there is itself
    resolve_model("s3://bucket/adapter")          an address: copied here once, by `minilora.system.remote`
    resolve_model("mistralai/Mistral-7B-v0.1")    anything else is a hub id: downloaded once, then taken from the cache

Only what is read is downloaded: configuration and tokenizer (*.json, tokenizer.model), chat templates and
*.safetensors, all from the top of the repository. Second copies of the weights (consolidated*.safetensors,
original/) stay where they are, and so do pickled weights (.bin, .pth, .pt): loading a pickle runs whatever
code lies in it. An adapter is a model directory like any other.

Without a network, or with HF_HUB_OFFLINE=1, a snapshot that is in the cache is used as it is.

`push_files` goes the other way.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from minilora.system.errors import UserError
from minilora.system.remote import fetch_folder, is_address

_WEIGHTS = "*.safetensors"
_READ = ["*.json", "tokenizer.model*", _WEIGHTS, "*.jinja", "merges.txt"]
_NOT_READ = ["*/*", "consolidated*", "tekken.json", "*.bin.index.json"]


def resolve_model(
    path_or_hub_id: str, revision: str | None = None, token: str | None = None, weights: bool = True
) -> Path:
    """The directory of a model or an adapter: local, or of its snapshot in the hub's cache, downloaded if
    need be.

    Without `weights`, configuration and tokenizer are all that is downloaded. `revision` (branch, tag or
    commit) and `token` (default: the one of `hf auth login` or HF_TOKEN) concern the hub only. Raises
    UserError, which never holds the token, for a path or an id that leads nowhere and for whatever keeps the
    hub from answering.
    """
    path = Path(os.path.expanduser(path_or_hub_id))
    if path_or_hub_id and path.is_dir():
        return path
    if is_address(path_or_hub_id):
        return fetch_folder(path_or_hub_id, _wanted(weights), _NOT_READ)
    if path.is_file():
        raise UserError(f"{path_or_hub_id!r} is a file; give the directory it lies in: {path.parent}")
    if token is not None and not re.fullmatch("[!-~]+", token):
        raise UserError(
            "the token given is empty or holds a space, a line end or the like; give it as the hub shows it: hf_..."
        )
    snapshot = _download(path_or_hub_id, revision, token, _wanted(weights))
    if weights and not any(snapshot.glob("*.safetensors")):
        raise UserError(
            f"{path_or_hub_id} holds no .safetensors weights, and pickled ones (.bin, .pth, .pt) are never read; "
            "convert them, or choose a repository that has safetensors"
        )
    return snapshot


def _wanted(weights: bool) -> list[str]:
    return [pattern for pattern in _READ if weights or pattern != _WEIGHTS]


def _download(repo_id: str, revision: str | None, token: str | None, names: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo_id}"
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision, token=token, allow_patterns=names, ignore_patterns=_NOT_READ
            )
        )
    except errors.HFValidationError as error:
        raise UserError(
            f"no such directory: {repo_id!r} (nor can it be a hub id, which is name or owner/name)"
        ) from error
    except errors.GatedRepoError as error:
        mend = (
            f"accept its licence at {page}, then log in with `hf auth login` or pass a token of that account"
        )
        raise UserError(f"{repo_id} is gated: {mend}") from error
    except errors.RepositoryNotFoundError as error:
        mend = "correct the name, or if it is private, log in with `hf auth login` or pass a token"
        raise UserError(
            f"{repo_id!r} is neither a directory here nor a repository at {constants.ENDPOINT}: {mend}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{repo_id} has no revision {revision!r}; they are listed at {page}/commits"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HTTPError) as error:
        obstacle = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
        raise UserError(
            f"{repo_id} is not (or not wholly) in the cache, and {_obstacle(obstacle)}"
        ) from error


def push_files(repo_id: str, files: Mapping[str, Path | bytes], message: str, private: bool = False) -> str:
    """Commit files, or what is to be in them, to a model repository, which is made if need be. Returns its
    address.

    One commit: all of them are there or none. The token is the one of `hf auth login` or HF_TOKEN. Raises
    UserError, which never holds it, for a name that cannot be one and for whatever keeps the hub from taking
    the files.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    hub = huggingface_hub.HfApi(endpoint=constants.ENDPOINT)
    additions = [huggingface_hub.CommitOperationAdd(name, content) for name, content in files.items()]
    try:
        repository = hub.create_repo(repo_id, private=private or None, exist_ok=True)
        hub.create_commit(repository.repo_id, additions, commit_message=message)
    except errors.HFValidationError as error:
        raise UserError(
            f"{repo_id!r} cannot be the name of a repository on the hub, which is owner/name"
        ) from error
    except (errors.LocalTokenNotFoundError, errors.RepositoryNotFoundError) as error:
        raise UserError(
            f"{repo_id} cannot be written: nobody is logged in who may; log in with `hf auth login`"
        ) from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled, RuntimeError) as error:
        reason = (
            error.__cause__ if isinstance(error, RuntimeError) else error
        )  # of a large file the cause says why
        raise UserError(f"{repo_id} cannot be written: {_obstacle(reason)}") from error
    return f"{constants.ENDPOINT}/{repository.repo_id}"


def _obstacle(error: BaseException | None) -> str:
    """Why the hub did not give what was asked for, and the mend. Of the error only kind and status: its text
    may hold headers.
    """
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE keeps this from the network; unset it"
    if not isinstance(error, errors.HfHubHTTPError):
        return f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}); check the network and try again"
    status = error.response.status_code
    mend = {
        401: "the token is not accepted; log in with `hf auth login`",
        403: "the token may not do this; use one that has write access",
        429: "too many requests; wait a while, or log in",
    }
    return f"{constants.ENDPOINT} answers {status}: {mend.get(status, 'try again later')}"
