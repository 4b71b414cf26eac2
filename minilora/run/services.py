"""The services that record a run besides metrics.jsonl: MLflow, TensorBoard and W&B, behind one interface.

    mlflow         One MLflow run for one training: settings as parameters, records as metrics, adapter and
                   other results as artifacts. A resumed training continues its MLflow run. Without a
                   tracking server the store is `mlflow.db` beside output_dir, one SQLite file for all runs
                   there: `mlflow ui --backend-store-uri sqlite:///mlflow.db`.
    tensorboard    Event files in output_dir/tensorboard. `tensorboard --logdir` over the parent directory of
                   several runs compares them.
    wandb          One run of Weights & Biases for one training: settings and records, without files, code,
                   command line or printed lines. WANDB_PROJECT names the project. With WANDB_MODE=offline
                   all of it stays in output_dir/wandb, for `wandb sync`. A resumed training continues its
                   run; offline it begins another one, with the whole history.

MLflow's client is used without MLflow's global state (`mlflow.start_run`), which belongs to the program that
imported minilora, and W&B's run is one beside that program's own. Credentials come from the environment
(MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN, WANDB_API_KEY) or from `wandb
login`, and are never asked for, printed or recorded.
"""

import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from minilora.system.redaction import whole, without_secrets

MLFLOW_DEFAULTS = {  # where the environment sets no other value
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; MLflow's default is 120
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # MLflow's default is 7, with doubling pauses: two minutes
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
MLFLOW_PARAMETERS_PER_CALL, MLFLOW_METRICS_PER_CALL = 100, 1000  # MLflow refuses more in one log_batch
WANDB_DEFAULTS = {"WANDB_SILENT": "true"}
WANDB_SETTINGS = dict(
    reinit="create_new",
    init_timeout=20,  # seconds; W&B's default is 90
    finish_timeout=60,  # W&B's default is to wait for ever
    finish_timeout_raises=True,
    console="off",
    disable_git=True,  # the address of a repository can hold a token
    disable_code=True,
    x_disable_meta=True,  # so can a command line
    x_save_requirements=False,
)
SQLITE = "sqlite:///"
EXPERIMENT = "minilora"
DIRECTORY_TAG = "minilora.run.output_dir"

Records = Sequence[tuple[float, dict]]  # (seconds since 1970, record)


class Service(Protocol):
    """A service that keeps records. Every method may raise any exception, except those of the state."""

    name: str
    address: str  # for messages, without secrets
    is_open: bool

    def open(self) -> None: ...
    def send(self, records: Records) -> None: ...
    def finish(self, status: str, files: Sequence[Path]) -> None: ...
    def disconnect(self) -> None: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


class MlflowRun:
    """One run in an MLflow store."""

    name = "mlflow"

    def __init__(
        self, directory: Path, run_name: str | None, parameters: dict[str, str], tracking_uri: str | None
    ):
        for name, value in MLFLOW_DEFAULTS.items():  # before the import of mlflow, which reads some of them
            os.environ.setdefault(name, value)
        self.directory, self.parameters = directory.resolve(), parameters
        self.run_name = run_name or self.directory.name
        given_uri = whole(tracking_uri or "") or os.environ.get("MLFLOW_TRACKING_URI")
        self.tracking_uri = given_uri or f"{SQLITE}{self.directory.parent / 'mlflow.db'}"
        self.artifacts = None if given_uri else (self.directory.parent / "mlartifacts").as_uri()
        self.address = f"MLflow at {without_secrets(self.tracking_uri)}"
        self.run_id: str | None = None
        self.client = None  # an MlflowClient while the service is open

    @property
    def is_open(self) -> bool:
        return self.client is not None

    def state_dict(self) -> dict:
        return {"run_id": self.run_id}

    def load_state_dict(self, state: dict) -> None:
        self.run_id = state.get("run_id")

    def open(self) -> None:
        """Continue the MLflow run of an earlier process or create one, and read which records it has."""
        from mlflow import MlflowClient

        if self.tracking_uri.startswith(SQLITE):
            # A store that cannot be opened fails here at once. MLflow would try ten times in 90 seconds.
            sqlite3.connect(self.tracking_uri.removeprefix(SQLITE)).close()
        client = MlflowClient(self.tracking_uri)
        run = self._continue_run(client) or self._create_run(client)
        self.run_id = run.info.run_id
        self.last_steps = {
            metric: max(point.step for point in client.get_metric_history(self.run_id, metric))
            for metric in run.data.metrics
        }
        self._log_parameters(client, known=run.data.params)
        self.client = client  # open only now: after a failure above, the next attempt begins anew

    def send(self, records: Records) -> None:
        """Record the values that the MLflow run does not have."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, round(seconds * 1000), record["step"])
            for seconds, record in records
            for name, value in record.items()
            if name != "step" and record["step"] > self.last_steps.get(name, -1)
        ]
        for start in range(0, len(metrics), MLFLOW_METRICS_PER_CALL):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + MLFLOW_METRICS_PER_CALL])

    def finish(self, status: str, files: Sequence[Path]) -> None:
        for file in files:
            self.client.log_artifact(self.run_id, str(file))
        self.client.set_terminated(self.run_id, status)

    def disconnect(self) -> None:
        self.client = None

    def _continue_run(self, client):
        """The MLflow run of the checkpoint that this training resumes, or None if it is not ours to continue.

        A checkpoint from another directory begins a training with an MLflow run of its own, which gets the
        records up to the checkpoint.
        """
        from mlflow.exceptions import MlflowException

        if self.run_id is None:
            return None
        try:
            run = client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        same_directory = run.data.tags.get(DIRECTORY_TAG) == str(self.directory)
        if run.info.lifecycle_stage != "active" or not same_directory:
            return None
        client.update_run(run.info.run_id, status="RUNNING")
        return run

    def _create_run(self, client):
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        if experiment := client.get_experiment_by_name(name):
            experiment_id = experiment.experiment_id
        else:
            experiment_id = client.create_experiment(name, artifact_location=self.artifacts)
        tags = {DIRECTORY_TAG: str(self.directory)}
        return client.create_run(experiment_id, tags=tags, run_name=self.run_name)

    def _log_parameters(self, client, known: dict[str, str]) -> None:
        """Record the settings that the run lacks. MLflow refuses to change a parameter."""
        from mlflow.entities import Param

        params = [Param(name, value) for name, value in self.parameters.items() if name not in known]
        for start in range(0, len(params), MLFLOW_PARAMETERS_PER_CALL):
            client.log_batch(self.run_id, params=params[start : start + MLFLOW_PARAMETERS_PER_CALL])


class TensorBoardLog:
    """Event files. Each `open` starts a file with the whole history, and hides the older files' content."""

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
        """A resumed run needs no state: it writes all records again."""

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.directory), purge_step=0)
        settings = "\n".join(f"    {name}: {value}" for name, value in self.parameters.items())
        self.writer.add_text("settings", settings)

    def send(self, records: Records) -> None:
        for seconds, record in records:
            for name, value in record.items():
                if name != "step":
                    self.writer.add_scalar(_tag(name), value, record["step"], walltime=seconds)
        self.writer.flush()  # so that a full disk raises here

    def finish(self, status: str, files: Sequence[Path]) -> None:
        self.writer.close()

    def disconnect(self) -> None:
        self.writer = None


class WandbRun:
    """One run in Weights & Biases."""

    name = "wandb"

    def __init__(self, directory: Path, run_name: str | None, parameters: dict[str, str]):
        for name, value in WANDB_DEFAULTS.items():  # before the import of wandb
            os.environ.setdefault(name, value)
        self.directory, self.parameters = directory.resolve(), parameters
        self.run_name = run_name or self.directory.name
        self.project = os.environ.get("WANDB_PROJECT", EXPERIMENT)
        self.offline = os.environ.get("WANDB_MODE") in ("offline", "dryrun")
        self.address = f"W&B's project {self.project}"
        self.run_id: str | None = None
        self.run = None  # a wandb.Run while the service is open

    @property
    def is_open(self) -> bool:
        return self.run is not None

    def state_dict(self) -> dict:
        return {"run_id": self.run_id, "directory": str(self.directory)}

    def load_state_dict(self, state: dict) -> None:
        """Continue the run, unless its checkpoint comes from another directory."""
        if state.get("directory") == str(self.directory) and not self.offline:
            self.run_id = state.get("run_id")

    def open(self) -> None:
        """Begin a run, or continue the one that an earlier process or attempt began."""
        import wandb

        if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False):
            raise RuntimeError("no API key: run `wandb login`, or set WANDB_MODE=offline")
        run = wandb.init(
            project=self.project,
            name=self.run_name,
            id=self.run_id,
            resume=None if self.offline or self.run_id is None else "allow",
            dir=os.environ.get("WANDB_DIR") or str(self.directory),
            config=self.parameters,
            settings=wandb.Settings(**WANDB_SETTINGS),
        )
        if not self.offline:
            self.run_id = run.id
        self.first_step = run.step  # the run has all records before it
        self.run = run

    def send(self, records: Records) -> None:
        """Record the values that the run does not have. W&B joins the records of one step."""
        for _, record in records:
            if record["step"] >= self.first_step:
                values = {_tag(name): value for name, value in record.items() if name != "step"}
                self.run.log(values, step=record["step"])

    def finish(self, status: str, files: Sequence[Path]) -> None:
        """Wait until all has arrived. The files stay here: an adapter belongs on the hub."""
        self.run.finish(exit_code=0 if status == "FINISHED" else 1)

    def disconnect(self) -> None:
        self.run = None


def _tag(metric: str) -> str:
    """loss -> train/loss, eval_loss -> eval/loss."""
    return f"eval/{metric.removeprefix('eval_')}" if metric.startswith("eval_") else f"train/{metric}"
