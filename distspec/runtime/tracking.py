"""MLflow: one run per stage, with settings, lineage, curves, files and the registered model. The only user of mlflow.

Models are registered as the checkpoint's own files (safetensors and JSON), never as a pickled flavor: nothing that is
loaded from the registry can run code.
"""

import copy
import json
import logging
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from distspec.addresses import Place, address_of
from distspec.config import Experiment
from distspec.errors import ConfigError, DistspecWarning
from distspec.files import local_copy

__all__ = ["Run", "serve", "tracking_uri"]

_LONGEST_PARAM = 6_000


def tracking_uri(experiment: Experiment) -> str:
    """Say where runs are kept: the setting, else MLFLOW_TRACKING_URI, else a SQLite file in the output folder.

    Raises:
        ConfigError: the output is in a bucket, where no database can lie, and nothing else is said.
    """
    chosen = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if chosen:
        return chosen
    output = address_of(experiment.output)
    if not isinstance(output, Path):
        raise ConfigError(
            f"output is {output}, where no database of runs can lie: say by tracking.uri or MLFLOW_TRACKING_URI where "
            "runs are tracked, such as 'http://server:5000' or 'sqlite:////home/me/mlflow.db'"
        )
    return f"sqlite:///{output.resolve() / 'mlflow.db'}"


class Run:
    """One stage of one experiment in MLflow, for the time of a `with` block.

    A stage that was interrupted and runs again with the same `key` goes on in its old run, so that a curve is whole.
    The run ends as FINISHED, or as FAILED or KILLED by the exception that leaves the block.

    Arguments:
        experiment: whose settings are recorded.
        stage: name of the stage.
        key: digest of what the stage makes; identifies a run to go on with.
        lineage: what the stage reads, such as store and model digests; kept as tags.

    Raises:
        ConfigError: the tracking server or database cannot be used.
    """

    def __init__(self, experiment: Experiment, stage: str, key: str, lineage: Mapping[str, str]) -> None:
        # Before mlflow is imported, since it reads this then: usage data stay here.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        # Imported here: it takes seconds, and most commands never track.
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        for chatty in ("mlflow", "alembic", "urllib3"):
            logging.getLogger(chatty).setLevel(logging.ERROR)
        self._experiment = experiment
        self._unsent: list[Callable[[], object]] = []
        self._closing = False
        self._trouble = ""
        uri = tracking_uri(experiment)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        try:
            self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            self.id = self._open(stage, key, lineage, uri)
        except (MlflowException, OSError) as error:
            reason = _without_password(str(error).splitlines()[0])
            raise ConfigError(f"cannot track runs at {_without_password(uri)}: {reason}") from None

    def _open(self, stage: str, key: str, lineage: Mapping[str, str], uri: str) -> str:
        name = self._experiment.name
        found = self._client.get_experiment_by_name(name)
        if found is None:
            artifacts = None
            if uri.startswith("sqlite:"):
                beside = Path(uri.removeprefix("sqlite:///")).resolve().parent
                artifacts = (beside / "mlartifacts").as_uri()
            experiment_id = self._client.create_experiment(name, artifact_location=artifacts)
        else:
            experiment_id = found.experiment_id
        mine = (
            f"tags.`distspec.key` = '{key}' and tags.`distspec.stage` = '{stage}' and attributes.status != 'FINISHED'"
        )
        open_runs = self._client.search_runs([experiment_id], mine, max_results=1)
        if open_runs:
            run_id: str = open_runs[0].info.run_id
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        tags = {"distspec.stage": stage, "distspec.key": key} | {f"distspec.{k}": v for k, v in lineage.items()}
        run_id = self._client.create_run(experiment_id, run_name=f"{stage}-{key}", tags=tags).info.run_id
        from mlflow.entities import Param

        # The tracking address may hold a password.
        settings = _flatten(self._experiment.model_dump(mode="json", exclude_none=True, exclude={"tracking"}))
        params = [Param(k, str(v)[:_LONGEST_PARAM]) for k, v in settings.items()]
        for start in range(0, len(params), 100):
            self._client.log_batch(run_id, params=params[start : start + 100])
        return run_id

    def nested(self, name: str, params: Mapping[str, Any]) -> "Run":
        """Begin a run inside this one, or go on with the one of this name; `end` closes it.

        Arguments:
            name: tells it from the others inside this one.
            params: its parameters.
        """
        inner = copy.copy(self)  # shares what is unsent, so that everything arrives in its order
        inner.id = ""
        self._send(lambda: inner._begin_inside(self.id, name, params))
        return inner

    def _begin_inside(self, outer: str, name: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        parent = self._client.get_run(outer)
        tags = {"mlflow.parentRunId": outer, "distspec.key": f"{parent.data.tags['distspec.key']}/{name}"}
        mine = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = self._client.search_runs([parent.info.experiment_id], mine, max_results=1)
        if found:
            self.id = found[0].info.run_id
            self._client.update_run(self.id, status="RUNNING")
            return
        tags |= {"distspec.stage": parent.data.tags["distspec.stage"]}
        self.id = self._client.create_run(parent.info.experiment_id, run_name=name, tags=tags).info.run_id
        self._client.log_batch(self.id, params=[Param(k, str(v)[:_LONGEST_PARAM]) for k, v in params.items()])

    def end(self, status: str, reason: str = "") -> None:
        """Close the run as FINISHED, FAILED or KILLED, and say why."""
        if reason:
            self._send(lambda: self._client.set_tag(self.id, "distspec.reason", reason[:_LONGEST_PARAM]))
        self._send(lambda: self._client.set_terminated(self.id, status))

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record numbers at one step, such as an epoch."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(name, float(value), now, step) for name, value in values.items()]
        self._send(lambda: self._client.log_batch(self.id, metrics=points))

    def last_step(self, name: str) -> int:
        """Give the largest step at which a metric was recorded, -1 if never or if the server does not answer."""
        from mlflow.exceptions import MlflowException

        try:
            history = self._client.get_metric_history(self.id, name)
        except (MlflowException, OSError) as error:
            # At worst a few points are recorded twice, which costs less than the training.
            self._trouble = _without_password(str(error).splitlines()[0])
            return -1
        return max((point.step for point in history), default=-1)

    def reads(self, name: str, digest: str, place: str) -> None:
        """Record the data that the stage reads as the run's dataset."""
        from mlflow.entities import Dataset, DatasetInput

        dataset = Dataset(name, digest, "local", json.dumps({"uri": place}))
        self._send(lambda: self._client.log_inputs(self.id, [DatasetInput(dataset)]))

    def text(self, content: str, name: str) -> None:
        """Keep a text file."""
        self._send(lambda: self._client.log_text(self.id, content, name))

    def summary(self, content: Mapping[str, Any], name: str) -> None:
        """Keep a JSON file."""
        self._send(lambda: self._client.log_dict(self.id, dict(content), name))

    def figure(self, figure: Any, name: str) -> None:
        """Keep a matplotlib figure as a picture."""
        self._send(lambda: self._client.log_figure(self.id, figure, name))

    def register(
        self,
        folder: Place,
        facts: Mapping[str, str],
        loss: float,
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
    ) -> None:
        """Keep a checkpoint and register it as the newest version of the experiment's model.

        The alias `newest` moves to it, and `best` to the version of smallest loss among those that can be compared with
        it: from the same store, with the same kind of loss.

        Arguments:
            folder: of the checkpoint.
            facts: lineage, kept as tags of the version; `store` and `loss`, the kind of the loss, among them.
            loss: on the validation set.
            inputs: length of each input of the model for a spectrum, by name; 0 is a single number.
            outputs: likewise.
        """
        signed = _signature(inputs, outputs)
        self._send(lambda: self._register(folder, dict(facts), loss, signed))

    def _register(self, folder: Place, facts: dict[str, str], loss: float, signed: str) -> None:
        from mlflow.exceptions import MlflowException

        name = self._experiment.tracking.model or self._experiment.name
        with local_copy(folder) as local:
            self._client.log_artifacts(self.id, str(local), "model")
        self._client.log_text(self.id, signed, "model/MLmodel")
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{self._client.get_run(self.id).info.artifact_uri}/model"
        tags = facts | {"validation_loss": repr(loss)}
        version = self._client.create_model_version(name, source=source, run_id=self.id, tags=tags).version
        self._client.set_registered_model_alias(name, "newest", version)
        known = self._client.search_model_versions(f"name = '{name}'")
        like = [one for one in known if all(one.tags.get(key) == facts[key] for key in ("store", "loss"))]
        best = min(like, key=lambda one: float(one.tags["validation_loss"]))
        self._client.set_registered_model_alias(name, "best", best.version)

    def _send(self, call: Callable[[], object]) -> None:
        """Pass something on to the server; what it does not take waits for the end of the stage.

        The work does not depend on its record: a server that goes away must not cost a night's training.
        """
        from mlflow.exceptions import MlflowException

        self._unsent.append(call)
        if len(self._unsent) > 1 and not self._closing:
            return
        try:
            while self._unsent:
                self._unsent[0]()
                self._unsent.pop(0)
        except (MlflowException, OSError) as error:
            self._trouble = _without_password(str(error).splitlines()[0])

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = "FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"
        self._closing = True
        self.end(status)
        if self._unsent:
            warnings.warn(
                f"{len(self._unsent)} records of run {self.id} did not reach the tracking server ({self._trouble}); "
                "the results themselves are whole",
                DistspecWarning,
                stacklevel=2,
            )


def serve(experiment: Experiment, port: int) -> int:
    """Serve the pages of the experiment's runs on the loopback interface until interrupted; give the exit status.

    Raises:
        ConfigError: there are no runs yet, or the runs are kept by a server that has pages of its own.
    """
    uri = tracking_uri(experiment)
    if uri.startswith(("http:", "https:")):
        raise ConfigError(f"runs are tracked by a server; open {_without_password(uri)} in a browser")
    if uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise ConfigError(f"no runs in {experiment.output} yet; run `distspec run` first")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    # Nobody needs the server to run jobs, and that part has had holes (CVE-2026-0545).
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return subprocess.call([*command, "--port", str(port)], env=environment)


def _signature(inputs: Mapping[str, int], outputs: Mapping[str, int]) -> str:
    """Describe the model to MLflow: its inputs and outputs. No flavor is named, so that nothing there can run code."""
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    def schema(lengths: Mapping[str, int]) -> Schema:
        shapes = {name: (-1, length) if length else (-1,) for name, length in lengths.items()}
        return Schema([TensorSpec(np.dtype(np.float32), shape, name) for name, shape in shapes.items()])

    text: str = Model(signature=ModelSignature(schema(inputs), schema(outputs))).to_yaml()
    return text


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn a tree of settings into `section.key` names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _without_password(text: str) -> str:
    """Hide what stands between // and @ in addresses."""
    return re.sub(r"//[^/@\s]*@", "//", text)
