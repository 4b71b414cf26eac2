"""Find a model in a local directory, at an address or on the Hugging Face hub, and push files to the hub.

    resolve_model("out/adapter")                  an existing directory is returned unchanged
    resolve_model("s3://bucket/adapter")          an address is copied once, by `minilora.system.remote`
    resolve_model("mistralai/Mistral-7B-v0.1")    anything else is a hub id: downloaded once, then cached
    resolve_model("owner/name/folder")            a folder of a repository, as PEFT's `subfolder`

Only files that minilora reads are downloaded: configuration and tokenizer (*.json, tokenizer.model), chat
templates and *.safetensors, all from the top of the repository or of the folder. Second copies of the weights
(consolidated*.safetensors, original/) are skipped. Pickled weights (pytorch_model*.bin, adapter_model.bin)
are downloaded only where there are no safetensors. `minilora.formats.pickled` reads their tensors, and runs
nothing in them. An adapter is a model directory like any other.

Without a network, or with HF_HUB_OFFLINE=1, a cached snapshot is used as it is.
"""

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from minilora.system.errors import UserError
from minilora.system.redaction import is_address
from minilora.system.remote import fetch_folder

MODEL_FILES = ["*.json", "tokenizer.model*", "*.jinja", "merges.txt"]  # all but the weights
_SAFETENSORS, _PICKLED = ["*.safetensors"], ["pytorch_model*.bin", "adapter_model.bin"]
_UNWANTED, _PICKLED_INDEX = ["*/*", "consolidated*", "tekken.json"], ["*.bin.index.json"]
_FOLDER = re.compile(r"\w[\w.+=-]*", re.ASCII)  # in a repository: no pattern, and no other place


def resolve_model(
    path_or_hub_id: str, revision: str | None = None, token: str | None = None, weights: bool = True
) -> Path:
    """The local directory of a model or an adapter, downloaded first if necessary.

    Without `weights`, only configuration and tokenizer are downloaded. `revision` (branch, tag or commit) and
    `token` (default: from `hf auth login` or HF_TOKEN) are for the hub only. Raises UserError if there is no
    such path or id, or if the hub does not answer; the message never contains the token.
    """
    path = Path(os.path.expanduser(path_or_hub_id))
    if path_or_hub_id and path.is_dir():
        return path
    if path.is_file() and not is_address(path_or_hub_id):
        raise UserError(f"{path_or_hub_id!r} is a file; use its directory instead: {path.parent}")
    if token is not None and not re.fullmatch("[!-~]+", token):
        raise UserError(
            "the token is empty or contains a space, a line end or another character that no token has; "
            "use it as the hub shows it: hf_..."
        )
    fetch = partial(_download, path_or_hub_id, revision, token)
    if is_address(path_or_hub_id):
        fetch = partial(fetch_folder, path_or_hub_id)
    folder = fetch(MODEL_FILES + _SAFETENSORS * weights, _UNWANTED + _PICKLED_INDEX)
    if weights and not any(folder.glob("*.safetensors")):
        folder = fetch(MODEL_FILES + _PICKLED, _UNWANTED)
        if not any(folder.glob("*.bin")):
            raise UserError(
                f"{path_or_hub_id} holds neither *.safetensors nor pytorch_model*.bin nor adapter_model.bin, "
                "and no other weights are read (such as GGUF); take the model that it was made from"
            )
    return folder


def _download(
    name: str, revision: str | None, token: str | None, wanted: list[str], unwanted: list[str]
) -> Path:
    """The cached snapshot of a repository, or of a folder in it. `wanted` and `unwanted` are file patterns.

    name: owner/name or owner/name/folder. Raises UserError.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    repo_id, folder = _split_folder(name)
    inside = f"{folder}/" if folder else ""
    page = f"{constants.ENDPOINT}/{repo_id}"
    try:
        Path(constants.HF_HUB_CACHE).expanduser()
    except RuntimeError as error:
        problem = f"{repo_id} cannot be downloaded: this user has no home directory"
        raise UserError(f"{problem}; set HF_HOME to a directory that you can write") from error
    try:
        snapshot = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            allow_patterns=[inside + pattern for pattern in wanted],
            ignore_patterns=[inside + pattern for pattern in unwanted],
        )
    except errors.HFValidationError as error:
        problem = f"no such directory: {name!r} (nor can it be a hub id: name, owner/name, owner/name/folder)"
        raise UserError(problem) from error
    except errors.GatedRepoError as error:
        login = "log in with `hf auth login` or pass a token of that account"
        raise UserError(f"{repo_id} is gated: accept its licence at {page}, then {login}") from error
    except errors.RepositoryNotFoundError as error:
        problem = f"{name!r} is neither a local directory nor a repository at {constants.ENDPOINT}"
        login = "log in with `hf auth login` or pass a token"
        raise UserError(f"{problem}: correct the name, or if it is private, {login}") from error
    except errors.RevisionNotFoundError as error:
        problem = f"{repo_id} has no revision {revision!r}; see {page}/commits"
        raise UserError(problem) from error
    except (errors.LocalEntryNotFoundError, errors.HTTPError) as error:
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
        problem = f"there is no folder {name}, {repo_id} is not (or not completely) in the cache"
        problem += f", and {_explain_failure(cause)}"
        raise UserError(problem) from error
    if folder and not Path(snapshot, folder).is_dir():
        raise UserError(f"{repo_id} has no folder {folder!r} with a model's files; see {page}")
    return Path(snapshot, folder)


def _split_folder(name: str) -> tuple[str, str]:
    """The repository's id and the folder in it, "" for its top. An impossible folder stays in the id."""
    owner, *rest = name.split("/")
    if len(rest) > 1 and all(_FOLDER.fullmatch(part) for part in rest[1:]):
        if Path(owner).is_dir():  # a slip in a path such as outputs/run/checkpoint-10
            raise UserError(f"no such directory: {name!r}, although {owner!r} is one")
        return f"{owner}/{rest[0]}", "/".join(rest[1:])
    return name, ""


def push_files(repo_id: str, files: Mapping[str, Path | bytes], message: str, private: bool = False) -> str:
    """Commit files (name -> a local path or the contents) to a model repository. Returns its address.

    A missing repository is created. A single commit adds all files or none. The token comes from
    `hf auth login` or HF_TOKEN. Raises UserError for an invalid name, and if the hub does not accept the
    files; the message never contains the token.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    hub = huggingface_hub.HfApi(endpoint=constants.ENDPOINT)
    additions = [huggingface_hub.CommitOperationAdd(name, content) for name, content in files.items()]
    try:
        repository = hub.create_repo(repo_id, private=private or None, exist_ok=True)
        hub.create_commit(repository.repo_id, additions, commit_message=message)
    except errors.HFValidationError as error:
        problem = f"{repo_id!r} cannot be the name of a repository on the hub, which is owner/name"
        raise UserError(problem) from error
    except (errors.LocalTokenNotFoundError, errors.RepositoryNotFoundError) as error:
        problem = f"{repo_id} cannot be written: you need write access; log in with `hf auth login`"
        raise UserError(problem) from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled, RuntimeError) as error:
        # The upload of a large file fails with a RuntimeError; its cause is the hub's answer.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        raise UserError(f"{repo_id} cannot be written: {_explain_failure(cause)}") from error
    return f"{constants.ENDPOINT}/{repository.repo_id}"


def _explain_failure(error: BaseException | None) -> str:
    """Why the hub could not do what was requested, and what helps.

    Only the error's type and status are used, because its text may contain headers.
    """
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE keeps this from the network; unset it"
    if not isinstance(error, errors.HfHubHTTPError):
        reason = f"cannot be reached ({type(error).__name__}); check the network and try again"
        return f"{constants.ENDPOINT} {reason}"
    status = error.response.status_code
    advice = {
        401: "the token is not accepted; log in with `hf auth login`",
        403: "the token may not do this; use one that has write access",
        429: "too many requests; wait a while, or log in",
    }
    return f"{constants.ENDPOINT} answers {status}: {advice.get(status, 'try again later')}"
