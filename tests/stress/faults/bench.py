"""The reference run, runs in child processes with the same flags, and rows of the table."""

import io
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tests.stress.faults import compare as compare_lib
from tests.stress.faults import worker

ROOT = pathlib.Path(__file__).parents[3]
DIGESTS = "digests.json"
LIMIT_SECONDS = 300  # for each wait; a child that takes longer hangs and is lost
TRAIN, VALIDATION, TEST, BATCH, EPOCHS, EVERY_STEPS = 160, 40, 40, 16, 4, 3
STEPS = EPOCHS * (TRAIN // BATCH)
FLAGS = {
  "data.validation_size": VALIDATION,
  "batch_size": BATCH,
  "eval_batch_size": VALIDATION,
  "total_epochs": EPOCHS,
  "checkpoint.every_steps": EVERY_STEPS,
  "log.pictures": False,
  "log.tensorboard": False,
}

Row = dict[str, Any]


class Child:
  """A worker process, and the events that it reported on its pipe."""

  def __init__(self, bench: "Bench", workdir: pathlib.Path, *, pause: float, limit: int):
    self.begun: int | None = None  # steps begun, with those of earlier processes
    self.start: int | None = None  # the step at which it started
    self.phase = worker.STARTING
    self.saved: list[int] = []  # steps of the checkpoints that it committed
    self.deleted: list[int] = []
    self.errors: list[str] = []  # the lines on standard error
    self.seconds_to_start = 0.0
    self._changed = threading.Condition()
    self._launched = time.monotonic()
    end, pipe = os.pipe()
    environment = bench.environment | {
      "FAULTS_PIPE": str(pipe),
      "FAULTS_SEED": str(bench.draw_seed()),
      "FAULTS_PAUSE": str(pause),
      "FAULTS_LIMIT": str(limit),
    }
    command = [sys.executable, "-m", "tests.stress.faults.worker", *bench.flags]
    self.process = subprocess.Popen(
      [*command, f"--workdir={workdir}"],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,  # not a file, whose size may be limited too
      pass_fds=[pipe],
    )
    os.close(pipe)
    sources = ((end, self._note), (self.process.stderr, self.errors.append))
    self._readers = [threading.Thread(target=self._read, args=s, daemon=True) for s in sources]
    for reader in self._readers:
      reader.start()

  def _read(self, source: Any, take: Callable[[str], None]) -> None:
    with open(source) if isinstance(source, int) else io.TextIOWrapper(source) as lines:
      for line in lines:
        with self._changed:
          take(line.rstrip("\n"))
          self._changed.notify_all()

  def _note(self, line: str) -> None:
    event, _, value = line.partition(" ")
    if event == "phase":
      self.phase = value
    elif event == "saved":
      self.saved.append(int(value))
    elif event == "deleted":
      self.deleted.append(int(value))
    elif event in ("from", "step"):
      self.begun = int(value)
      if self.start is None:
        self.start, self.phase = self.begun, worker.BETWEEN
        self.seconds_to_start = time.monotonic() - self._launched

  def wait_until(self, condition: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> bool:
    """Waits until `condition` holds; False if the process ended or time ran out."""
    deadline = time.monotonic() + seconds
    with self._changed:
      while not condition():
        left = deadline - time.monotonic()
        if left <= 0 or self.process.poll() is not None:
          return False
        self._changed.wait(min(left, 0.1))
    return True

  def wait_for_steps(self, steps: int = 1) -> bool:
    """Waits until this process has begun `steps`."""
    return self.wait_until(lambda: self.start is not None and self.begun >= self.start + steps)

  def wait_for_end(self, seconds: float = LIMIT_SECONDS) -> int:
    """The exit status, -N after signal N; kills a process that takes longer than `seconds`."""
    try:
      self.process.wait(seconds)
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()
      return sys.maxsize
    finally:
      for reader in self._readers:
        reader.join()
    return self.process.returncode

  def signal(self, signum: int) -> None:
    self.process.send_signal(signum)

  @property
  def steps(self) -> int:
    """Steps begun by this process."""
    return 0 if self.start is None else self.begun - self.start

  def expect(self, *statuses: int) -> compare_lib.Problems:
    """Waits for the end, which must have one of `statuses`."""
    status = self.wait_for_end()
    if status in statuses:
      return []
    last = self.errors[-1] if self.errors else "nothing"
    return [f"exit status {status} instead of {' or '.join(map(str, statuses))}; last line: {last}"]


class Bench:
  """The folder for all runs, the reference run, and children with the same flags."""

  def __init__(self, folder: pathlib.Path, options: Namespace):
    self.folder = folder
    self.options = options
    self.random = random.Random(options.seed)
    self.reference = folder / "reference"
    # All children share one cache, which faults may damage too.
    self.environment = os.environ | {
      "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
      "PYTHONUNBUFFERED": "1",
    }
    values = FLAGS | {"data.name": f"npz:{write_data(folder / 'shapes.npz')}"}
    self.flags = ["--config=configs/quickstart.py"]
    self.flags += [f"--config.{key}={value}" for key, value in values.items()]
    self.seconds_to_start = 0.0  # until training starts, with a filled cache
    self._lock = threading.Lock()
    self._folders = 0

  def draw_seed(self) -> int:
    with self._lock:
      return self.random.randrange(2**32)

  def new_workdir(self, like: pathlib.Path | None = None) -> pathlib.Path:
    """A new folder, or a copy of `like`."""
    with self._lock:
      self._folders += 1
      workdir = self.folder / f"run-{self._folders}"
    if like:
      shutil.copytree(like, workdir)
    return workdir

  def launch(self, workdir: pathlib.Path, *, pause: float = 0, limit: int = 0) -> Child:
    return Child(self, workdir, pause=pause, limit=limit)

  def finish(self, workdir: pathlib.Path) -> tuple[Child, compare_lib.Problems]:
    """Resumes without faults until the end, which must equal that of the reference."""
    child = self.launch(workdir)
    problems = child.expect(0)
    return child, self.report(problems or self.compare(workdir))

  def compare(self, workdir: pathlib.Path) -> compare_lib.Problems:
    with self._lock:  # this is no test of Orbax in two threads
      return compare_lib.compare(self.reference, workdir)

  def report(self, problems: compare_lib.Problems) -> compare_lib.Problems:
    """Prints problems at once, because the table comes last."""
    for problem in problems:
      print(f"lost: {problem}", file=sys.stderr, flush=True)
    return problems

  def make_reference(self) -> None:
    """Makes it twice: the first run fills the compilation cache, the second must equal it.

    Raises:
      RuntimeError: the run fails, or the two runs differ, although there are no faults.
    """
    problems = self.launch(self.reference).expect(0)
    if not problems:
      child, problems = self.finish(self.new_workdir())
      self.seconds_to_start = child.seconds_to_start
    if problems:
      raise RuntimeError(f"a run without faults: {'; '.join(problems)}")

  def stop_late(self, name: str) -> pathlib.Path:
    """A run stopped by SIGTERM one epoch before its end, with several checkpoints; made once."""
    workdir = self.folder / name
    if not workdir.exists():
      child = self.launch(workdir)
      child.wait_for_steps(STEPS - TRAIN // BATCH)
      child.signal(signal.SIGTERM)
      problems = child.expect(128 + signal.SIGTERM)
      if problems or len(compare_lib.list_steps(workdir)) < 2:
        raise RuntimeError(f"SIGTERM left {compare_lib.list_steps(workdir)}: {problems}")
    return workdir

  def map(
    self, function: Callable[[Any], compare_lib.Problems], cases: Iterable[Any]
  ) -> list[compare_lib.Problems]:
    """The problems of each case; several cases run in parallel."""
    with ThreadPoolExecutor(self.options.jobs) as pool:
      return list(pool.map(function, cases))


def write_data(path: pathlib.Path) -> pathlib.Path:
  """Writes a slice of the shapes data set, so that not every start has to draw all of it."""
  from flax_cifar.data.sources import shapes

  train, test = TRAIN + VALIDATION, TEST
  arrays = shapes.make_shapes(num_train=train, num_test=test, image_size=32, seed=0)
  names = ("train_images", "train_labels", "test_images", "test_labels")
  np.savez(path, **dict(zip(names, arrays[:-1], strict=True)))
  return path


def describe(scenario: str, results: Iterable[compare_lib.Problems], notes: str = "") -> Row:
  """A row of the table, from the problems of each fault."""
  results = list(results)
  lost = sum(map(bool, results))
  return {
    "scenario": scenario,
    "injected": len(results),
    "survived": len(results) - lost,
    "lost": lost,
    "notes": notes,
    "problems": [problem for problems in results for problem in problems],
  }


def expect_refusal(child: Child) -> compare_lib.Problems:
  """Expects exit status 2 and one line with the reason."""
  problems = child.expect(2)
  if not problems and (len(child.errors) != 1 or not child.errors[0].startswith("error: ")):
    problems = [f"{len(child.errors)} lines instead of one error: {child.errors[:3]}"]
  return problems
