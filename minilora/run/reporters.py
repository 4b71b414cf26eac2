"""Where a run's records go besides metrics.jsonl: to MLflow and to TensorBoard, neither of which can stop a
training.

A place that records may fail at any time: a server is killed, a disk fills. Then one line of warning is
printed and the training goes on. The place is left alone for `REST` seconds, so that a server which hangs
instead of refusing costs a few seconds in every five minutes, and then tried again with all that it missed;
the end of the run is a last try. What it has is not recorded twice.

    mlflow         one MLflow run for one training: settings as parameters, every record as metrics, the adapter and its papers as
                   artifacts. A resumed training goes on in its run. Without a tracking server the store is
                   `mlflow.db` beside output_dir, one SQLite file for all the runs there: `mlflow ui
                   --backend-store-uri sqlite:///mlflow.db`.
    tensorboard    event files in output_dir/tensorboard; look at several runs with `tensorboard --logdir` over their parent.

MLflow's client is used without its global state (`mlflow.start_run`), which belongs to whoever imported us.
Credentials come from the environment (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD,
MLFLOW_TRACKING_TOKEN) and are never printed or recorded.
"""

import importlib
import importlib.util
import os
import re
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from minilora.system.errors import UserError, suggestion

PACKAGES = (
    "mlflow",
    "tensorboard",
)  # the names of places, of the packages that they need, and of minilora's extras
REST = 300.0  # seconds between two tries at a place that failed
MLFLOW_DEFAULTS = dict(  # where the environment does not say otherwise
    MLFLOW_HTTP_REQUEST_TIMEOUT="10",  # seconds, of 120
    MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",  # of 7, with pauses that double: two minutes
    MLFLOW_LOGGING_LEVEL="ERROR",
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true",
    MLFLOW_DISABLE_TELEMETRY="true",
)
SQLITE = "sqlite:///"
EXPERIMENT = "minilora"
DIRECTORY_TAG = "minilora.run.output_dir"

Records = Sequence[tuple[float, dict]]  # the time of each, in seconds since 1970, and the record


class Place(Protocol):
    """Somewhere records are kept. Every method but the state's may raise anything."""

    name: str
    address: str
    is_open: bool

    def open(self) -> None: ...
    def send(self, records: Records) -> None: ...
    def finish(self, status: str, files: Sequence[Path]) -> None: ...
    def leave(self) -> None: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


def make_reporters(
    names: Sequence[str],
    output_dir: Path,
    parameters: dict,
    run_name: str | None = None,
    tracking_uri: str | None = None,
) -> "list[Reporter]":
    """A reporter for each name; `all` means those that are installed. Nothing is opened or written yet.

    Raises UserError for an unknown name, for a package that is missing, and for a password in the address of
    a tracking server, which would be saved with the settings.
    """
    if "all" in names:
        names = [name for name in PACKAGES if importlib.util.find_spec(name)]
    for name in names:
        if name not in PACKAGES:
            raise UserError(
                f"report_to = {name!r} is not known{suggestion(name, (*PACKAGES, 'all', 'none'))}"
            )
    try:
        password = tracking_uri and urlsplit(tracking_uri).password
    except ValueError as error:  # a bracket that is never closed
        raise UserError(
            f"mlflow_tracking_uri = {without_secrets(tracking_uri)!r} is no address; write http://host:port"
        ) from error
    if password:
        raise UserError(
            f"mlflow_tracking_uri {without_secrets(tracking_uri)} holds a password, which would be saved with the settings; "
            "put it into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    parameters = {name: without_secrets(_text(value)) for name, value in parameters.items()}
    places: list[Place] = []
    if "mlflow" in names:
        for name, value in MLFLOW_DEFAULTS.items():
            os.environ.setdefault(name, value)
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        places.append(MlflowRun(output_dir, run_name or output_dir.resolve().name, parameters, uri))
    if "tensorboard" in names:
        places.append(TensorBoardLog(output_dir / "tensorboard", parameters))
    for name in names:
        try:
            importlib.import_module(
                name
            )  # now, for it takes memory, which the plan of a training on the CPU has to count
        except ImportError as error:
            raise UserError(
                f"report_to = {name} needs a package ({error}): pip install 'minilora[{name}]'"
            ) from error
    return [Reporter(place) for place in places]


class Reporter:
    """Brings every record of a run to one place, once. Whatever that place raises ends here."""

    def __init__(self, place: Place):
        self.place = place
        self.records: list[tuple[float, dict]] = []
        self.delivered = 0  # of them
        self.next_try = 0.0
        self.failing = False

    def begin(self, records: Sequence[dict], state: dict, say: Callable[[str], None]) -> None:
        """A resumed run hands over its earlier records and the `state_dict` of its earlier life. `say` prints
        a warning.
        """
        self.records, self.say = [(time.time(), record) for record in records], say
        self.place.load_state_dict(state)

    def log(self, record: dict) -> None:
        """Bring this record, and those that are still waiting."""
        self.records.append((time.time(), record))
        if time.monotonic() >= self.next_try:
            self._try(self._deliver)

    def finish(self, status: str, files: Sequence[Path]) -> None:
        """The last try. `status` is in MLflow's words: FINISHED, FAILED or KILLED."""

        def deliver_and_finish() -> None:
            self._deliver()
            self.place.finish(status, files)

        self._try(deliver_and_finish)

    def _deliver(self) -> None:
        if not self.place.is_open:
            self.delivered = 0  # a place that is opened anew gets everything and takes what it lacks
            self.place.open()
        self.place.send(self.records[self.delivered :])
        self.delivered = len(self.records)

    def _try(self, deliver: Callable[[], None]) -> None:
        try:
            deliver()
            self.failing = False
        except Exception as error:  # of any kind: no report is worth a training
            self.place.leave()
            self.next_try = time.monotonic() + REST
            if not self.failing:
                where, why = self.place.address, _reason(error)
                self.say(
                    f"warning: {where} does not record ({why}); training goes on and metrics.jsonl has it all"
                )
            self.failing = True


class MlflowRun:
    """One run in an MLflow store."""

    name = "mlflow"

    def __init__(self, directory: Path, run_name: str, parameters: dict[str, str], tracking_uri: str | None):
        self.directory, self.run_name, self.parameters = directory.resolve(), run_name, parameters
        self.tracking_uri = tracking_uri or f"sqlite:///{self.directory.parent / 'mlflow.db'}"
        self.address = f"MLflow at {without_secrets(self.tracking_uri)}"
        self.artifacts = None if tracking_uri else (self.directory.parent / "mlartifacts").as_uri()
        self.run_id: str | None = None
        self.client = None

    @property
    def is_open(self) -> bool:
        return self.client is not None

    def state_dict(self) -> dict:
        return {"run_id": self.run_id}

    def load_state_dict(self, state: dict) -> None:
        self.run_id = state.get("run_id")

    def open(self) -> None:
        """Go on with the run of an earlier life, or begin one; look up what it has."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        if self.tracking_uri.startswith(SQLITE):  # MLflow would try ten times, for a minute and a half
            sqlite3.connect(self.tracking_uri.removeprefix(SQLITE)).close()
        client = MlflowClient(self.tracking_uri)
        run = self._earlier_run(client)
        if run is None:
            tags = {DIRECTORY_TAG: str(self.directory)}
            run = client.create_run(self._experiment_id(client), tags=tags, run_name=self.run_name)
        else:
            client.update_run(run.info.run_id, status="RUNNING")
        self.run_id = run.info.run_id
        self.last_steps = {
            metric: max(point.step for point in client.get_metric_history(self.run_id, metric))
            for metric in run.data.metrics
        }
        missing = [
            Param(name, value) for name, value in self.parameters.items() if name not in run.data.params
        ]
        for start in range(0, len(missing), 100):  # MLflow's limit
            client.log_batch(self.run_id, params=missing[start : start + 100])
        self.client = client

    def send(self, records: Records) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, round(when * 1000), record["step"])
            for when, record in records
            for name, value in record.items()
            if name != "step" and record["step"] > self.last_steps.get(name, -1)
        ]
        for start in range(0, len(metrics), 1000):  # MLflow's limit
            self.client.log_batch(self.run_id, metrics=metrics[start : start + 1000])

    def finish(self, status: str, files: Sequence[Path]) -> None:
        for file in files:
            self.client.log_artifact(self.run_id, str(file))
        self.client.set_terminated(self.run_id, status)

    def leave(self) -> None:
        self.client = None

    def _earlier_run(self, client):
        """The run of the checkpoint we go on from, if the store has it and it reports on this directory: a
        checkpoint of another directory begins a training of its own, whose run gets the records up to
        there."""
        from mlflow.exceptions import MlflowException

        if self.run_id is None:
            return None
        try:
            run = client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        ours = run.info.lifecycle_stage == "active" and run.data.tags.get(DIRECTORY_TAG) == str(
            self.directory
        )
        return run if ours else None

    def _experiment_id(self, client) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = client.get_experiment_by_name(name)
        return (
            experiment.experiment_id
            if experiment
            else client.create_experiment(name, artifact_location=self.artifacts)
        )


class TensorBoardLog:
    """Event files. Each opening writes the whole history into a new file and hides what older ones in the
    directory hold.
    """

    name = "tensorboard"

    def __init__(self, directory: Path, parameters: dict[str, str]):
        self.directory, self.parameters = directory, parameters
        self.address = f"TensorBoard in {directory}"
        self.writer = None

    @property
    def is_open(self) -> bool:
        return self.writer is not None

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing is needed: everything is written anew."""

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.directory), purge_step=0)
        self.writer.add_text(
            "settings", "\n".join(f"    {name}: {value}" for name, value in self.parameters.items())
        )

    def send(self, records: Records) -> None:
        for when, record in records:
            for name, value in record.items():
                if name != "step":
                    tag = (
                        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                    )
                    self.writer.add_scalar(tag, value, record["step"], walltime=when)
        self.writer.flush()  # a disk that is full says so now

    def finish(self, status: str, files: Sequence[Path]) -> None:
        self.writer.close()

    def leave(self) -> None:
        self.writer = None


def without_secrets(text: str) -> str:
    """The text without the credentials that addresses and messages carry: user:password@, the query of an
    address, hub tokens.
    """
    text = re.sub(r"(\w://)[^/\s@]+@", r"\1", text)
    text = re.sub(r"(\w://[^\s?]+)\?[^\s'\")]+", r"\1", text)
    return re.sub(r"\b(hf_|Bearer |Basic )[\w.=/+-]{8,}", r"\1...", text)


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _reason(error: Exception, most: int = 160) -> str:
    """The error in one short line. The innermost cause says most: the outer ones wrap it in addresses."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__
    words = without_secrets(" ".join(str(error).split())) or type(error).__name__
    return words if len(words) <= most else f"{words[:most].rstrip()}..."
