"""Metrics: a CSV that survives every interruption, and Weights & Biases.

Lightning's own CSV logger deletes earlier rows when a run resumes; this one appends, and drops
exactly those rows that the resumed run is about to write again.
"""

import csv
import os
import sys
import typing
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

COLUMNS = ("phase", "step", "metric", "value")

Mode = Literal["online", "offline", "disabled", "shared"]
"""Modes of W&B."""


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases; online when a key is set up, else offline."""

    project: str = "qat-lightning"
    """Project that the run belongs to."""
    name: str | None = None
    """Name of the run; null lets W&B choose."""
    entity: str | None = None
    """Team or user; null takes the key's default."""
    upload_artifact: bool = True
    """Log the final artifact as a W&B artifact."""


class MetricsCsv(Logger):
    """Appends ``phase,step,metric,value`` rows to a file; values at full precision."""

    def __init__(self, path: Path, phase: str) -> None:
        super().__init__()
        self.path = path
        self.phase = phase

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """The phase that writes."""
        return self.phase

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """Nothing: the run's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row for each metric and flush, so that a killed run loses nothing."""
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(COLUMNS)
            writer.writerows([self.phase, step, k, repr(float(v))] for k, v in metrics.items())

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop this phase's rows after ``step``, and a last row that was cut off in writing."""
        if not self.path.exists():
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if len(row) == len(COLUMNS)]
        kept = [
            row
            for row in rows[1:]
            if row[0] != self.phase or (row[1].isdigit() and int(row[1]) <= step)
        ]
        temporary = self.path.with_suffix(".csv.tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([list(COLUMNS), *kept])
        os.replace(temporary, self.path)


def read_metrics(path: Path) -> list[tuple[str, int, str, float]]:
    """Rows (phase, step, metric, value) of a metrics.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            (row["phase"], int(row["step"]), row["metric"], float(row["value"]))
            for row in csv.DictReader(file)
        ]


def wandb_mode() -> Mode:
    """What $WANDB_MODE says, else online where a W&B key is set up and works, else offline."""
    for mode in typing.get_args(Mode):
        if os.environ.get("WANDB_MODE") == mode:
            return cast(Mode, mode)
    import wandb

    try:
        return "online" if wandb.login(prompt=False) else "offline"
    except wandb.Error as error:
        print(f"W&B cannot be reached, so this run is logged offline ({error})", file=sys.stderr)
        return "offline"


class Loggers:
    """The loggers of a run: a CSV for each phase, and one W&B run for all of them.

    Args:
        kind: ``wandb`` or ``none``.
        config: W&B options.
        directory: directory of the run.
        resolved: the run's configuration, logged once.
    """

    def __init__(
        self,
        kind: Literal["wandb", "none"],
        config: WandbConfig,
        directory: Path,
        resolved: dict[str, Any],
    ) -> None:
        self.kind = kind
        self.config = config
        self.directory = directory
        self.resolved = resolved
        self.run: Any = None

    def _start(self) -> Any:
        import wandb

        mode = wandb_mode()
        return wandb.init(
            project=self.config.project,
            name=self.config.name,
            entity=self.config.entity,
            dir=str(self.directory),
            config=self.resolved,
            id=_run_id(self.directory),
            mode=mode,
            resume="allow" if mode == "online" else None,
            # the progress bar stays readable
            settings=wandb.Settings(console="off", quiet=True),
        )

    def phase(self, name: str) -> list[Logger]:
        """The loggers of one training phase; W&B metrics are prefixed with its name.

        The first call starts the W&B run: not before the model has loaded, so that input which
        proves wrong leaves nothing.
        """
        loggers: list[Logger] = [MetricsCsv(self.directory / "metrics.csv", name)]
        if self.kind == "wandb" and rank_zero_only.rank == 0:
            self.run = self.run or self._start()
            wandb_logger = WandbLogger(experiment=self.run, prefix=name)
            wandb_logger.LOGGER_JOIN_CHAR = "/"  # W&B groups charts by what stands before a slash
            loggers.append(wandb_logger)
        return loggers

    def finish(self, artifact: Path, summary: dict[str, Any]) -> None:
        """Log the finished artifact (a W&B artifact of type ``model``) and the final figures."""
        if self.run is None:
            return
        import wandb

        self.run.summary.update(summary)
        if self.config.upload_artifact:
            item = wandb.Artifact(f"{self.directory.name}-artifact", type="model")
            # immutable: W&B reads the files where they lie instead of copying them first
            item.add_dir(str(artifact), policy="immutable")
            self.run.log_artifact(item)
        self.run.finish()


def _run_id(directory: Path) -> str:
    """The run's W&B id: made once and kept beside the run, so that a resumed run is the same."""
    path = directory / "wandb_id"
    if not path.exists():
        import wandb

        path.write_text(wandb.sdk.lib.runid.generate_id(), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
