"""Reporters send a run's records to MLflow, TensorBoard and W&B, and no failure there can stop the training.

A service can fail at any time: a server is killed, a disk fills up. The reporter then prints one line of
warning and the training continues. It sends nothing for `RETRY_SECONDS`, so a server that hangs costs one
timeout, a few seconds, in every five minutes. After that it tries again, with all records that the service
missed. The end of the run is the last attempt. No record arrives twice.

The services themselves are in `minilora.run.services`.
"""

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from minilora.run.services import MlflowRun, Service, TensorBoardLog, WandbRun
from minilora.system.errors import UserError, suggestion
from minilora.system.redaction import whole, without_secrets

PACKAGES = (
    "mlflow",
    "tensorboard",
    "wandb",
)  # each is the name of a service, of its package and of minilora's extra
RETRY_SECONDS = 300.0  # from a failure to the next attempt


def make_reporters(
    names: Sequence[str],
    output_dir: Path,
    parameters: dict,
    run_name: str | None = None,
    tracking_uri: str | None = None,
) -> "list[Reporter]":
    """A reporter for each name, or with `all` for each installed package. Nothing is opened or written yet.

    `parameters` are the settings to record. Raises UserError for an unknown name, for a missing package, and
    for a password in `tracking_uri`, which would be saved with the settings.
    """
    if "all" in names:
        names = [name for name in PACKAGES if importlib.util.find_spec(name)]
    _check_names(names)
    _check_tracking_uri(tracking_uri)
    texts = {name: without_secrets(_to_text(value)) for name, value in parameters.items()}
    services: list[Service] = []
    if "mlflow" in names:
        services.append(MlflowRun(output_dir, run_name, texts, tracking_uri))
    if "tensorboard" in names:
        services.append(TensorBoardLog(output_dir / "tensorboard", texts))
    if "wandb" in names:
        services.append(WandbRun(output_dir, run_name, texts))
    for name in names:
        _import_package(name)
    return [Reporter(service) for service in services]


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if name not in PACKAGES:
            nearest = suggestion(name, (*PACKAGES, "all", "none"))
            raise UserError(f"report_to = {name!r} is not known{nearest}")


def _check_tracking_uri(tracking_uri: str | None) -> None:
    try:
        password = tracking_uri and urlsplit(whole(tracking_uri)).password
    except ValueError as error:  # an unclosed bracket
        raise UserError(
            f"mlflow_tracking_uri = {without_secrets(tracking_uri)!r} is no address; write http://host:port"
        ) from error
    if password:
        raise UserError(
            f"mlflow_tracking_uri {without_secrets(tracking_uri)} holds a password, which would be saved "
            "with the settings; put it into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )


def _import_package(name: str) -> None:
    """Import at the start of the run: the memory plan of a training on the CPU must count the package too."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"report_to = {name} needs a package ({error}): pip install 'minilora[{name}]'"
        ) from error


def _to_text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


class Reporter:
    """Sends every record of a run to one service, once. Whatever the service raises is caught here."""

    def __init__(self, service: Service):
        self.service = service
        self.records: list[tuple[float, dict]] = []
        self.sent = 0  # the first so many of the records have arrived
        self.next_try = 0.0  # in seconds of time.monotonic
        self.failing = False
        self.say: Callable[[str], None] = print

    def begin(self, records: Sequence[dict], state: dict, say: Callable[[str], None]) -> None:
        """Start with the earlier records of a resumed run and the `state_dict` that its service had.

        `say` prints a warning.
        """
        self.records, self.say = [(time.time(), record) for record in records], say
        self.service.load_state_dict(state)

    def log(self, record: dict) -> None:
        """Send this record, and those that wait for a service that failed."""
        self.records.append((time.time(), record))
        if time.monotonic() >= self.next_try:
            with self._failure_is_a_warning():
                self._send_waiting()

    def finish(self, status: str, files: Sequence[Path]) -> None:
        """The last attempt. `status` is MLflow's: FINISHED, FAILED or KILLED. `files` are the results."""
        with self._failure_is_a_warning():
            self._send_waiting()
            self.service.finish(status, files)

    def _send_waiting(self) -> None:
        if not self.service.is_open:
            self.sent = 0  # a reopened service gets all records and skips those that it has
            self.service.open()
        self.service.send(self.records[self.sent :])
        self.sent = len(self.records)

    @contextmanager
    def _failure_is_a_warning(self) -> Iterator[None]:
        """Print the first failure of an outage, and start the pause before the next attempt."""
        handled = sys.exc_info()[1]  # what ended the training, if this is its report
        try:
            yield
            self.failing = False
        except Exception as error:  # any exception: no report is worth a training
            self.service.disconnect()
            self.next_try = time.monotonic() + RETRY_SECONDS
            if not self.failing:
                self.say(
                    f"warning: {self.service.address} does not record ({_root_cause(error, handled)}); "
                    "training goes on and metrics.jsonl has it all"
                )
            self.failing = True


def _root_cause(error: BaseException, handled: BaseException | None, max_length: int = 160) -> str:
    """The text of the innermost cause, in one line. The outer errors only wrap it in addresses.

    handled: an exception that was being handled when the service failed, and did not cause that.
    """
    while (cause := error.__cause__ or error.__context__) not in (None, handled):
        error = cause
    text = without_secrets(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= max_length else f"{text[:max_length].rstrip()}..."
