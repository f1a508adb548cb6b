"""The log of a run: metrics.jsonl (the truth), TensorBoard, and the screen."""

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import PIL.Image
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
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboardX.proto.tensor_pb2 import TensorProto
from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto

from flax_cifar import errors, files, metrics
from flax_cifar import state as state_lib
from flax_cifar.parallel import agreement
from flax_cifar.run import config as config_lib
from flax_cifar.run import tables
from flax_cifar.run import tracker as tracker_lib

LINE_SECONDS = 60  # between two progress lines where no terminal shows a bar
Report = Callable[[metrics.Totals, int], None]  # the epoch's totals, and how many steps are new


class Screen(Console):
  """A console that falls silent once its output is closed (`| head`); rich would exit."""

  def on_broken_pipe(self) -> None:
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
      os.dup2(nowhere.fileno(), self.file.fileno())


class RunLog:
  """Appends one record per epoch to metrics.jsonl and shows it.

  Opening it rewrites the file with the records of `progress`, the checkpoint that the run goes on
  from. So records after that checkpoint are dropped, and damage to the file does no harm. Of
  several processes the first alone writes.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    progress: state_lib.Progress,
    *,
    config: Mapping[str, Any],
  ):
    """`config` is that of the run, as nested dictionaries."""
    # Not where FORCE_COLOR asks for it: escapes do not belong into a log file.
    terminal = sys.stdout.isatty()
    quiet = not config["log"]["screen"]
    self.console = Screen(highlight=False, force_terminal=terminal, quiet=quiet)
    self.writes = agreement.is_first()
    self._path = workdir / "metrics.jsonl"
    self._total_epochs, flat = config["total_epochs"], config_lib.flatten(config)
    self._events = None
    self._tracker = None
    if self.writes:
      lines = (files.encode_json(record) + "\n" for record in progress.records)
      files.write_text(self._path, "".join(lines))
      if config["log"]["tensorboard"]:
        self._events = _open_events(workdir / "tensorboard", progress.step)
        self._write_event(progress.step, [_create_text("config", _format_config(flat))])
      if config["log"]["tracker"] != tracker_lib.NONE:
        self._tracker = tracker_lib.Tracker(config["log"]["tracker"], flat, workdir)

  def print(self, text: str) -> None:
    """Prints plain text."""
    self.console.print(text, markup=False, soft_wrap=True)

  def banner(self, facts: Mapping[str, Any]) -> None:
    """Prints what is about to run, a line each."""
    width = max(map(len, facts))
    for name, value in facts.items():
      self.print(f"{name.ljust(width)}  {value}")

  def print_resumed(self, progress: state_lib.Progress, steps_per_epoch: int) -> None:
    """Prints where a run resumes; nothing for a new run."""
    if progress.step:
      epoch = progress.step / steps_per_epoch
      self.print(f"resumed at step {progress.step:,}, epoch {epoch:.2f}")
    earlier = metrics.list_earlier(progress.records, "total_epochs", self._total_epochs)
    if earlier:
      self.print(
        f"extended from {errors.list_some(earlier)} to {self._total_epochs} epochs; the earlier "
        "ones followed the shorter schedule"
      )

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

      def report(totals: metrics.Totals, steps: int) -> None:
        nonlocal done, last_line, earlier
        earlier = float(totals["seconds"]) if earlier is None else earlier
        done, now = done + steps, time.perf_counter()
        text = _describe(totals, earlier + now - started)
        bar.update(task, completed=done, description=text)
        if not terminal and now - last_line > LINE_SECONDS:
          last_line = now
          self.print(f"epoch {epoch}  step {done}/{total}  {text}")

      yield report

  def write(self, record: metrics.Record) -> None:
    """Appends the record of an epoch to the file, TensorBoard and the screen."""
    agreement.by_first(self._append)(record)
    self.print(self._format(record))

  def _append(self, record: metrics.Record) -> None:
    with self._path.open("a", encoding="utf-8") as file:
      file.write(files.encode_json(record) + "\n")
    points = _list_points(record)
    self._write_event(
      record["step"], [Summary.Value(tag=tag, simple_value=mean) for tag, mean in points.items()]
    )
    if self._tracker:
      self._tracker.log(points, step=record["step"])

  def write_pictures(self, paths: Iterable[pathlib.Path], step: int) -> None:
    """Shows PNG files that the run has written in TensorBoard."""
    if self._events:
      self._write_event(step, [_create_image(path) for path in paths])

  def _write_event(self, step: int, values: Sequence[Summary.Value]) -> None:
    """Writes values to TensorBoard's file at once; nothing where there is no file or no value."""
    if self._events and values:
      summary = Summary(value=list(values))
      self._events.write_event(Event(step=step, wall_time=time.time(), summary=summary))
      self._events.flush()

  def _format(self, record: metrics.Record) -> str:
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
    """Closes TensorBoard's file and the tracker's run."""
    if self._events:
      self._events.close()
    if self._tracker:
      self._tracker.finish()


def _open_events(folder: pathlib.Path, step: int) -> EventsWriter:
  """A new file for TensorBoard, which forgets what earlier ones hold of later steps than `step`.

  It is written at once: a SummaryWriter has a queue, which its flush leaves where it is.
  """
  folder.mkdir(exist_ok=True)
  events = EventsWriter(str(folder / "events"))
  start = SessionLog(status=SessionLog.START)
  events.write_event(Event(step=step + 1, wall_time=time.time(), session_log=start))
  return events


def _list_points(record: metrics.Record) -> dict[str, float]:
  """The means of a record, called "train/loss" and so on."""
  names = [name for name in record if name not in ("epoch", "step", "total_epochs", "commit")]
  means = {name: record[name] for name in names if not isinstance(record[name], list)}
  return {name.replace("_", "/", 1): mean for name, mean in means.items()}


def _create_text(tag: str, text: str) -> Summary.Value:
  """Markdown that TensorBoard shows under Text."""
  plugin = SummaryMetadata.PluginData(plugin_name="text")
  tensor = TensorProto(
    dtype="DT_STRING",
    string_val=[text.encode(errors="replace")],  # a path may be no UTF-8
    tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
  )
  return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)


def _create_image(path: pathlib.Path) -> Summary.Value:
  with PIL.Image.open(path) as image:
    width, height = image.size
  encoded = Summary.Image(
    height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes()
  )
  return Summary.Value(tag=path.stem, image=encoded)


def _format_config(flat: Mapping[str, Any]) -> str:
  rows = [[key, f"`{value}`"] for key, value in flat.items()]
  return tables.format_markdown(["key", "value"], rows)


def _describe(totals: metrics.Totals, seconds: float) -> str:
  loss, accuracy = (value.mean() for value in metrics.compute_means(totals).values())
  rate = totals["count"].sum() / seconds
  return f"loss {loss:.3f} acc {accuracy:.1%} {rate:.0f} images/s"
