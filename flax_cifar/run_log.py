"""What a run tells: metrics.jsonl (the truth), TensorBoard, and the console."""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from flax_cifar.metrics import Totals, compute_means
from flax_cifar.seeds import describe_seeds
from flax_cifar.workdir import write_whole

LINE_SECONDS = 60  # between two lines of progress where there is no terminal for a bar

Record = dict[str, Any]
Report = Callable[[Totals, int], None]  # the epoch's totals, and how many steps are new


class Screen(Console):
  """Goes on in silence when nobody reads any more (`| head`), where rich would end the process."""

  def on_broken_pipe(self) -> None:
    with open(os.devnull, "w") as nowhere:
      os.dup2(nowhere.fileno(), self.file.fileno())


class RunLog:
  """Appends one record per epoch to metrics.jsonl and shows it.

  Opening it writes the file anew with `records`, those of the checkpoint that the run goes on from:
  what came after it will be made again, and what happened to the file meanwhile does no harm.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    records: list[Record],
    step: int,
    total_epochs: int,
    tensorboard: bool,
  ):
    self.console = Screen(highlight=False)
    self._path = workdir / "metrics.jsonl"
    self._total_epochs = total_epochs
    self.records = list(records)
    write_whole(self._path, "".join(json.dumps(record) + "\n" for record in self.records))
    self._events = _open_events(workdir / "tensorboard", step) if tensorboard else None

  def say(self, text: str) -> None:
    """Prints plain text."""
    self.console.print(text, markup=False, soft_wrap=True)

  def banner(self, facts: Mapping[str, Any]) -> None:
    """Prints what is about to run, a line each."""
    width = max(map(len, facts))
    for name, value in facts.items():
      self.say(f"{name.ljust(width)}  {value}")

  @contextlib.contextmanager
  def progress(self, epoch: int, *, done: int, total: int) -> Iterator[Report]:
    """Yields a function to call now and then with the epoch's totals and the number of new steps.

    It moves a bar on a terminal; elsewhere it prints a line a minute.

    Args:
      epoch: counted from 1.
      done: steps of this epoch that an earlier process made.
      total: steps of this epoch.
    """
    columns = (
      TextColumn("epoch {task.fields[epoch]}"),
      BarColumn(None),
      MofNCompleteColumn(),
      TextColumn("{task.description}"),
      TimeElapsedColumn(),
      TextColumn("ETA"),
      TimeRemainingColumn(),
    )
    terminal = self.console.is_terminal
    with Progress(*columns, console=self.console, transient=True, disable=not terminal) as bar:
      task = bar.add_task("", total=total, completed=done, epoch=epoch)
      started = last_line = time.perf_counter()
      earlier: float | None = None  # seconds of this epoch in an earlier process

      def report(totals: Totals, steps: int) -> None:
        nonlocal done, last_line, earlier
        earlier = float(totals["seconds"]) if earlier is None else earlier
        done, now = done + steps, time.perf_counter()
        text = _describe(totals, earlier + now - started)
        bar.update(task, completed=done, description=text)
        if not terminal and now - last_line > LINE_SECONDS:
          last_line = now
          self.say(f"epoch {epoch}  step {done}/{total}  {text}")

      yield report

  def write(
    self,
    *,
    epoch: int,
    step: int,
    learning_rate: np.ndarray,
    train: Totals,
    validation: Mapping[str, np.ndarray] | None,
  ) -> None:
    """Appends an epoch to the file, TensorBoard and the screen.

    What has an axis for the seeds is averaged, and the file also gets a list `..._per_seed`.

    Args:
      epoch: counted from 1.
      step: steps done.
      learning_rate: of the epoch's last step, () or (seeds,).
      train: totals of the epoch.
      validation: `loss` and `accuracy`, () or (seeds,); None without a validation split.
    """
    values = {
      "learning_rate": learning_rate,
      **{f"train_{name}": value for name, value in compute_means(train).items()},
      **{f"validation_{name}": value for name, value in (validation or {}).items()},
      "seconds": train["seconds"],
      "images_per_second": train["count"].sum() / train["seconds"],
    }
    record: Record = {"epoch": epoch, "step": step}
    for name, value in values.items():
      record |= describe_seeds(name, value)
    self.records.append(record)
    with self._path.open("a") as file:
      file.write(json.dumps(record) + "\n")
    if self._events:
      tags = {name: name.replace("_", "/", 1) for name in values}
      points = [Summary.Value(tag=tag, simple_value=record[name]) for name, tag in tags.items()]
      event = Event(step=step, wall_time=time.time(), summary=Summary(value=points))
      self._events.write_event(event)
      self._events.flush()
    self.say(self._format(record))

  def _format(self, record: Record) -> str:
    width = len(str(self._total_epochs))
    text = (
      f"epoch {record['epoch']:{width}}/{self._total_epochs}  lr {record['learning_rate']:.2g}  "
      f"train loss {record['train_loss']:.4f} acc {record['train_accuracy']:6.2%}  "
    )
    if "validation_loss" in record:
      text += (
        f"validation loss {record['validation_loss']:.4f} "
        f"acc {record['validation_accuracy']:6.2%}  "
      )
    return text + f"{record['images_per_second']:.0f} images/s  {record['seconds']:.0f} s"

  def close(self) -> None:
    """Closes TensorBoard's file."""
    if self._events:
      self._events.close()


def _open_events(folder: pathlib.Path, step: int) -> EventsWriter:
  """A new file for TensorBoard, which forgets what earlier ones hold of later steps than `step`.

  It is written at once: a SummaryWriter has a queue, which its flush leaves where it is.
  """
  folder.mkdir(exist_ok=True)
  events = EventsWriter(str(folder / "events"))
  start = SessionLog(status=SessionLog.START)
  events.write_event(Event(step=step + 1, wall_time=time.time(), session_log=start))
  return events


def _describe(totals: Totals, seconds: float) -> str:
  loss, accuracy = (value.mean() for value in compute_means(totals).values())
  rate = totals["count"].sum() / seconds
  return f"loss {loss:.3f} acc {accuracy:.1%} {rate:.0f} images/s"


def median_rate(records: list[Record]) -> float:
  """Median of the epochs' training images per second."""
  return float(np.median([record["images_per_second"] for record in records]))
