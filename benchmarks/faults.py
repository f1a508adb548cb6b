"""Hurts runs in every way we know, and checks that what they end with is what it would have been.

Command     python -m benchmarks.faults [--kills 50] [--seed 0] [--output FILE]
                                        [--only kills signals ...] [--signals 5] [--damages 24]

A small run on a slice of the embedded data, with several checkpoints per epoch, is first made
without faults. Then it is made again and again, in other folders and with faults; after each the
same command goes on. A fault is survived if the run comes to its end and

  - metrics.jsonl and result.json are the same but for clocks, date and command,
  - every array of the last checkpoint is the same bit for bit, as Orbax alone reads it,
  - no checkpoint that was in its place when the fault struck is lost,
  - and it says what it should, with the exit status it should.

Everything else is lost, said at once, and makes the exit status 1. A kill is by SIGKILL, half of
them at a random time and half within a random phase of a save. See `faults_worker` for how a save
is stretched; nothing of the package is changed for it.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.common import write_json
from benchmarks.faults_worker import BETWEEN, SAVE_PHASES, STARTING
from benchmarks.results import format_table

ROOT = pathlib.Path(__file__).parents[1]
SEAL = "digests.json"
CLOCKS = ("seconds", "images_per_second", "train_seconds", "date", "command", "commit")
LIMIT_SECONDS = 300  # for whatever a child does; more is a hang, and lost
SECOND_SIGNAL_SECONDS = 2.0  # within which it must end the process
PAUSE = 0.012  # mean of the sleeps in a save: stretches it to about a second
LONG_PAUSE = 0.05
TRAIN, VALIDATION, TEST, BATCH, EPOCHS, EVERY_STEPS = 160, 40, 40, 16, 4, 3
STEPS = EPOCHS * (TRAIN // BATCH)
FILE_LIMIT = 32 * 2**10  # bytes; less than the arrays of a checkpoint
DISK = 128 * 2**20  # a run asks for 100 MiB before it starts
ROOM = 100 * 2**10  # left on it; less than a checkpoint
FLAGS = {
  "data.validation_size": VALIDATION,
  "batch_size": BATCH,
  "eval_batch_size": VALIDATION,
  "total_epochs": EPOCHS,
  "checkpoint.every_steps": EVERY_STEPS,
  "log.pictures": False,
  "log.tensorboard": False,
}

Problems = list[str]  # why a fault was not survived; empty if it was
Row = dict[str, Any]


def main() -> None:
  options = parse_options()
  rows: list[Row] = []
  with tempfile.TemporaryDirectory(prefix="faults-") as folder:
    bench = Bench(pathlib.Path(folder), options)
    bench.make_reference()
    for name in options.only:
      rows += SCENARIOS[name](bench)
  print(format_rows(rows))
  if options.output:
    write_json(options.output, rows)
  sys.exit(any(row["lost"] for row in rows))


def parse_options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--signals", type=int, default=5, help="of each of SIGINT, SIGTERM, SIGUSR1")
  parser.add_argument("--damages", type=int, default=24, help="of a checkpoint's files; 0 for all")
  parser.add_argument("--jobs", type=int, default=2, help="runs at once, where none is timed")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
  parser.add_argument("--output", default="", help="file for the record")
  return parser.parse_args()


def describe(scenario: str, results: Iterable[Problems], notes: str = "") -> Row:
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


def format_rows(rows: Sequence[Row]) -> str:
  header = ["scenario", "injected", "survived", "lost", "notes"]
  total = {name: sum(row[name] for row in rows) for name in header[1:-1]}
  lines = [*rows, {"scenario": "all", **total, "notes": ""}]
  return format_table(header, [[str(row[name]) for name in header] for row in lines])


#### A run as a child


class Child:
  """The worker in a process of its own, and what it said on its pipe."""

  def __init__(self, bench: "Bench", workdir: pathlib.Path, *, pause: float, limit: int):
    self.begun: int | None = None  # steps begun, with those of earlier processes
    self.start: int | None = None  # the step that it started at
    self.phase = STARTING
    self.saved: list[int] = []  # steps of checkpoints that came to their place
    self.deleted: list[int] = []
    self.errors: list[str] = []  # the lines on standard error
    self.seconds_to_start = 0.0
    self._news = threading.Condition()
    self._launched = time.monotonic()
    end, pipe = os.pipe()
    environment = bench.environment | {
      "FAULTS_PIPE": str(pipe),
      "FAULTS_SEED": str(bench.draw_seed()),
      "FAULTS_PAUSE": str(pause),
      "FAULTS_LIMIT": str(limit),
    }
    command = [sys.executable, "-m", "benchmarks.faults_worker", *bench.flags]
    self.process = subprocess.Popen(
      [*command, f"--workdir={workdir}"],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,  # no file: its size may be limited too
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
        with self._news:
          take(line.rstrip("\n"))
          self._news.notify_all()

  def _note(self, line: str) -> None:
    what, _, value = line.partition(" ")
    if what == "phase":
      self.phase = value
    elif what == "saved":
      self.saved.append(int(value))
    elif what == "deleted":
      self.deleted.append(int(value))
    elif what in ("from", "step"):
      self.begun = int(value)
      if self.start is None:
        self.start, self.phase = self.begun, BETWEEN
        self.seconds_to_start = time.monotonic() - self._launched

  def wait_until(self, condition: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> bool:
    """Waits for news that meet `condition`; False where the process ended or time ran out."""
    deadline = time.monotonic() + seconds
    with self._news:
      while not condition():
        left = deadline - time.monotonic()
        if left <= 0 or self.process.poll() is not None:
          return False
        self._news.wait(min(left, 0.1))
    return True

  def wait_for_steps(self, steps: int = 1) -> bool:
    """Waits until this process has begun `steps`."""
    return self.wait_until(lambda: self.start is not None and self.begun >= self.start + steps)

  def wait_for_end(self, seconds: float = LIMIT_SECONDS) -> int:
    """The exit status, -N by signal N. What takes longer than `seconds` is killed."""
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

  def expect(self, *statuses: int) -> Problems:
    """Waits for the end, which must have one of `statuses`."""
    status = self.wait_for_end()
    if status in statuses:
      return []
    last = self.errors[-1] if self.errors else "nothing"
    return [f"exit status {status} instead of {' or '.join(map(str, statuses))}; said: {last}"]


class Bench:
  """The folder for everything, the run without faults, and children with the same flags."""

  def __init__(self, folder: pathlib.Path, options: argparse.Namespace):
    self.folder = folder
    self.options = options
    self.random = random.Random(options.seed)
    self.reference = folder / "reference"
    # A cache of its own: it may be torn too, and is the same for all.
    self.environment = os.environ | {
      "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
      "PYTHONUNBUFFERED": "1",
    }
    values = FLAGS | {"data.name": f"npz:{write_data(folder / 'shapes.npz')}"}
    self.flags = ["--config=configs/quickstart.py"]
    self.flags += [f"--config.{key}={value}" for key, value in values.items()]
    self.seconds_to_start = 0.0  # of training, from a cache that is full
    self._lock = threading.Lock()
    self._folders = 0

  def draw_seed(self) -> int:
    with self._lock:
      return self.random.randrange(2**32)

  def new_workdir(self, like: pathlib.Path | None = None) -> pathlib.Path:
    """A folder that is new, or a copy of `like`."""
    with self._lock:
      self._folders += 1
      workdir = self.folder / f"run-{self._folders}"
    if like:
      shutil.copytree(like, workdir)
    return workdir

  def launch(self, workdir: pathlib.Path, *, pause: float = 0, limit: int = 0) -> Child:
    return Child(self, workdir, pause=pause, limit=limit)

  def finish(self, workdir: pathlib.Path) -> tuple[Child, Problems]:
    """Goes on without faults to the end, which must be that of the reference."""
    child = self.launch(workdir)
    problems = child.expect(0)
    return child, self.report(problems or self.compare(workdir))

  def compare(self, workdir: pathlib.Path) -> Problems:
    with self._lock:  # Orbax in two threads is none of our business
      return compare(self.reference, workdir)

  def report(self, problems: Problems) -> Problems:
    """Says problems at once: the table comes late."""
    for problem in problems:
      print(f"lost: {problem}", file=sys.stderr, flush=True)
    return problems

  def make_reference(self) -> None:
    """Twice: the first fills the compilation cache, the second must already be the same.

    Raises:
      RuntimeError: the run does not end well, or not twice in the same way, even without faults.
    """
    problems = self.launch(self.reference).expect(0)
    if not problems:
      child, problems = self.finish(self.new_workdir())
      self.seconds_to_start = child.seconds_to_start
    if problems:
      raise RuntimeError(f"a run without faults: {'; '.join(problems)}")

  def stop_late(self, name: str) -> pathlib.Path:
    """A run stopped by SIGTERM with an epoch to go and several checkpoints; made once."""
    workdir = self.folder / name
    if not workdir.exists():
      child = self.launch(workdir)
      child.wait_for_steps(STEPS - TRAIN // BATCH)
      child.signal(signal.SIGTERM)
      problems = child.expect(128 + signal.SIGTERM)
      if problems or len(list_steps(workdir)) < 2:
        raise RuntimeError(f"SIGTERM left {list_steps(workdir)}: {problems}")
    return workdir

  def map(self, function: Callable[[Any], Problems], cases: Iterable[Any]) -> list[Problems]:
    """The problems of each case, several at once."""
    with ThreadPoolExecutor(self.options.jobs) as pool:
      return list(pool.map(function, cases))


def write_data(path: pathlib.Path) -> pathlib.Path:
  """A slice of the embedded data, lest each of many starts draw all of it."""
  from flax_cifar.data.shapes import make_shapes

  train, test = TRAIN + VALIDATION, TEST
  arrays = make_shapes(num_train=train, num_test=test, image_size=32, seed=0)
  names = ("train_images", "train_labels", "test_images", "test_labels")
  np.savez(path, **dict(zip(names, arrays[:-1], strict=True)))
  return path


#### Comparison


def compare(reference: pathlib.Path, workdir: pathlib.Path) -> Problems:
  """What differs between two finished runs, apart from clocks."""
  problems = []
  for name, read in (("metrics.jsonl", read_metrics), ("result.json", read_result)):
    try:
      if read(workdir / name) != read(reference / name):
        problems.append(f"{name} differs")
    except (OSError, ValueError) as error:
      problems.append(f"{name} cannot be read: {error}")
  return problems or compare_arrays(reference, workdir)


def read_metrics(path: pathlib.Path) -> list[Any]:
  return [drop_clocks(json.loads(line)) for line in path.read_text().splitlines()]


def read_result(path: pathlib.Path) -> Any:
  return drop_clocks(json.loads(path.read_text()))


def drop_clocks(record: Mapping[str, Any]) -> dict[str, Any]:
  return {key: value for key, value in record.items() if key not in CLOCKS}


def compare_arrays(reference: pathlib.Path, workdir: pathlib.Path) -> Problems:
  """What differs between the last checkpoints of two runs."""
  try:
    theirs, ours = (restore_last(folder) for folder in (reference, workdir))
  except Exception as error:  # whatever Orbax raises
    return [f"the last checkpoint cannot be restored: {type(error).__name__}: {error}"]
  if theirs.keys() != ours.keys():
    return [f"the last checkpoint has other arrays: {sorted(theirs.keys() ^ ours.keys())[:3]}"]
  names = [name for name in theirs if not same_bits(theirs[name], ours[name])]
  return [f"{len(names)} arrays of the last checkpoint differ, {names[0]} first"] if names else []


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
  return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


def restore_last(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of the last checkpoint by name, and its step; by Orbax alone."""
  import jax
  import orbax.checkpoint as ocp

  step = list_steps(workdir)[-1]
  metadata = next((workdir / "checkpoints" / str(step)).glob("*/_METADATA"))
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(metadata.parent.absolute())
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    "step of the checkpoint": np.asarray(step),
    **{jax.tree_util.keystr(path): as_numpy(leaf) for path, leaf in leaves},
  }


def as_numpy(leaf: Any) -> np.ndarray:
  """A key of `jax.random` as its data."""
  import jax

  if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf)


def list_steps(workdir: pathlib.Path) -> list[int]:
  """The steps of the checkpoints in place, in order."""
  names = (path.name for path in (workdir / "checkpoints").glob("*"))
  return sorted(int(name) for name in names if name.isdecimal())


#### kill -9


@dataclasses.dataclass
class Round:
  """A run from its start to its end, however often it is killed."""

  workdir: pathlib.Path
  phases: list[str] = dataclasses.field(default_factory=list)  # each kill fell in
  steps: int = 0  # begun, by all its processes
  kept: set[int] = dataclasses.field(default_factory=set)  # checkpoints that must be there
  problems: Problems = dataclasses.field(default_factory=list)

  def add(self, child: Child) -> None:
    """Takes notice of a process that has ended.

    Raises nothing; a start at an earlier step than the last checkpoint is a problem.
    """
    if self.kept and child.start is not None and child.start < max(self.kept):
      self.problems.append(f"started at step {child.start}, though {max(self.kept)} was saved")
    self.steps += child.steps
    self.kept = (self.kept | set(child.saved)) - set(child.deleted)


def inject_kills(bench: Bench) -> list[Row]:
  """SIGKILL at random moments, with a new run whenever one has come to its end."""
  rounds, kills = [Round(bench.new_workdir())], 0
  while kills < bench.options.kills:
    now = rounds[-1]
    child = bench.launch(now.workdir, pause=PAUSE)
    kill_at_random(child, bench)
    problems = child.expect(0, -signal.SIGKILL)
    now.add(child)
    if child.process.returncode == -signal.SIGKILL:
      kills += 1
      now.phases.append(child.phase)
    else:
      now.problems += problems or bench.compare(now.workdir)
      rounds.append(Round(bench.new_workdir()))
    show_progress(f"{kills} of {bench.options.kills} kills, round {len(rounds)}")
  if rounds[-1].phases:
    child, problems = bench.finish(rounds[-1].workdir)
    rounds[-1].add(child)
    rounds[-1].problems += problems
  return describe_kills([run for run in rounds if run.phases], bench)


def kill_at_random(child: Child, bench: Bench) -> None:
  """Kills after a random time from the start of the process or of training, or within a save."""
  draw = bench.random
  way = draw.choices(("process", "training", "save"), (1, 1, 2))[0]
  if way == "process":
    child.wait_until(lambda: False, draw.uniform(0, 1.5 * bench.seconds_to_start))
  elif way == "training":
    child.wait_for_steps()
    child.wait_until(lambda: False, draw.uniform(0, 4))
  else:
    phase, number = draw.choice(SAVE_PHASES), draw.randint(1, 3)
    for _ in range(number):
      child.wait_until(lambda: child.phase not in SAVE_PHASES)
      child.wait_until(lambda: child.phase == phase)
    child.wait_until(lambda: False, draw.uniform(0, 2 * PAUSE))
  child.signal(signal.SIGKILL)


def describe_kills(rounds: Sequence[Round], bench: Bench) -> list[Row]:
  """A row per phase. The kills of a round survive or are lost together."""
  results: dict[str, list[Problems]] = collections.defaultdict(list)
  for run in rounds:
    bench.report(run.problems)
    for phase in run.phases:
      results[phase].append(run.problems)
  order = (STARTING, BETWEEN, *SAVE_PHASES)
  rows = [describe(f"kill -9, {name_moment(phase)}", results[phase]) for phase in order]
  begun, useful = sum(run.steps for run in rounds), STEPS * len(rounds)
  rows[0]["notes"] = f"{len(rounds)} runs of {STEPS} steps; " + describe_goodput(useful, begun)
  return rows


def name_moment(phase: str) -> str:
  return f"in a save: {phase}" if phase in SAVE_PHASES else phase


def describe_goodput(useful: int, begun: int) -> str:
  repeated = max(0, begun - useful)
  return f"{repeated} steps repeated, goodput {useful / (useful + repeated):.1%}"


def show_progress(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


#### Signals


def inject_signals(bench: Bench) -> list[Row]:
  names = ("SIGINT", "SIGTERM", "SIGUSR1")
  return [inject_signal(bench, signal.Signals[name]) for name in names]


def inject_signal(bench: Bench, signum: signal.Signals) -> Row:
  """Random moments of training; the same run goes on until its end, then a new one starts."""
  results: list[Problems] = []
  seconds: list[float] = []
  workdir = bench.new_workdir()
  while len(seconds) < bench.options.signals:
    child = bench.launch(workdir)
    child.wait_for_steps()
    child.wait_until(lambda: False, bench.random.uniform(0, 1.5))
    if child.process.poll() is None:
      sent = time.monotonic()
      child.signal(signum)
      problems = child.expect(128 + signum, 0)
      if child.process.returncode != 0:  # 0: it was already done
        seconds.append(time.monotonic() - sent)
        results.append(bench.report(problems or check_saved(child, workdir)))
    if (workdir / "result.json").exists():
      results[-1:] = [results[-1] + bench.report(bench.compare(workdir))] if results else []
      workdir = bench.new_workdir()
  results[-1] = results[-1] + bench.finish(workdir)[1]
  return describe(f"{signum.name} in training", results, f"to exit: {describe_seconds(seconds)}")


def check_saved(child: Child, workdir: pathlib.Path) -> Problems:
  """The step that a stopped run named must be the last checkpoint, and sealed."""
  match = re.search(r"saved at step ([\d,]+)", "\n".join(child.errors))
  if not match:
    return [f"said no step: {child.errors}"]
  step = int(match[1].replace(",", ""))
  if list_steps(workdir)[-1:] != [step]:
    return [f"said step {step}, left checkpoints {list_steps(workdir)}"]
  sealed = (workdir / "checkpoints" / str(step) / SEAL).exists()
  return [] if sealed else [f"the checkpoint of step {step} is not sealed"]


def describe_seconds(seconds: Sequence[float]) -> str:
  if not seconds:
    return "never"
  return f"median {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f} s)"


def inject_second_signals(bench: Bench) -> list[Row]:
  """A second signal within the save that the first one asked for ends the process at once."""
  seconds: list[float] = []
  results = []
  for _ in range(bench.options.signals):
    workdir = bench.new_workdir()
    child = bench.launch(workdir, pause=LONG_PAUSE)
    child.wait_for_steps(EVERY_STEPS + 2)
    child.signal(signal.SIGTERM)
    # It says when it has seen the first one: two that wait at once are one.
    child.wait_until(lambda child=child: bool(child.errors) and child.phase in SAVE_PHASES)
    sent = time.monotonic()
    child.signal(signal.SIGTERM)
    problems = child.expect(-signal.SIGTERM, 128 + signal.SIGTERM)
    seconds.append(time.monotonic() - sent)
    if seconds[-1] > SECOND_SIGNAL_SECONDS:
      problems.append(f"the second signal took {seconds[-1]:.1f} s")
    results.append(bench.report(problems) + bench.finish(workdir)[1])
  notes = f"to exit: {describe_seconds(seconds)}"
  return [describe("a second SIGTERM in the save", results, notes)]


#### Damaged checkpoints


def flip_bit(content: bytes) -> bytes:
  middle = len(content) // 2
  return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {  # None deletes the file
  "cut to 0 bytes": lambda content: b"",
  "cut to 1 byte": lambda content: content[:1],
  "cut to half": lambda content: content[: len(content) // 2],
  "cut by 1 byte": lambda content: content[:-1],
  "deleted": lambda content: None,
  "a bit flipped": lambda content: flip_bit(content) if content else content,
}


def damage(path: pathlib.Path, how: str) -> None:
  content = DAMAGES[how](path.read_bytes())
  if content is None:
    path.unlink()
  else:
    path.write_bytes(content)


def list_damages(contents: Mapping[str, bytes]) -> list[tuple[str, str]]:
  """Every (file, damage) that changes it, no two of which come to the same."""
  damages = []
  for file, content in contents.items():
    seen = [content]
    for how, change in DAMAGES.items():
      changed = change(content)
      if changed not in seen:
        seen.append(changed)
        damages.append((file, how))
  return damages


def draw_damages(
  damages: Sequence[tuple[str, str]], number: int, draw: random.Random
) -> list[tuple[str, str]]:
  """`number` of them, from the files in turn; 0 takes all."""
  by_file: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
  for damage in draw.sample(damages, len(damages)):
    by_file[damage[0]].append(damage)
  turns = sorted(
    ((turn, damage) for group in by_file.values() for turn, damage in enumerate(group)),
    key=lambda pair: pair[0],
  )
  return [damage for _, damage in turns][: number or None]


def inject_damages(bench: Bench) -> list[Row]:
  """Each file of the newest checkpoint; and all checkpoints at once."""
  base = bench.stop_late("stopped")
  folder = base / "checkpoints" / str(list_steps(base)[-1])
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
  cases = draw_damages(list_damages(contents), bench.options.damages, bench.random)
  unnoticed: list[str] = []
  results = bench.map(functools.partial(damage_file, bench, base, unnoticed), cases)
  notes = f"{len(cases) - len(unnoticed)} named, set aside, and the one before used"
  if unnoticed:
    notes += f"; {len(unnoticed)} in files that Orbax restores without: {name_files(unnoticed)}"
  rows = [describe("a file of the newest checkpoint damaged", results, notes)]
  return [*rows, describe("all checkpoints damaged", [damage_all(bench, base)], "refused")]


def damage_file(
  bench: Bench, base: pathlib.Path, unnoticed: list[str], case: tuple[str, str]
) -> Problems:
  """Damages a file; what nobody noticed is added to `unnoticed`, and harmless if all is equal."""
  name, how = case
  workdir = bench.new_workdir(base)
  step = list_steps(workdir)[-1]
  damage(workdir / "checkpoints" / str(step) / name, how)
  child, problems = bench.finish(workdir)
  if not is_named(child, step):
    unnoticed.append(name)
  elif not problems and child.start == step:
    problems = [f"step {step} was named as damaged, and yet used"]
  elif not problems and not list((workdir / "damaged").glob("*")):
    problems = [f"step {step} was not set aside"]
  return [f"{name} {how}: {problem}" for problem in problems]


def is_named(child: Child, step: int) -> bool:
  """Whether a warning names the checkpoint of `step`."""
  pattern = rf"warning: checkpoint .*\b{step}\b"
  return any(re.match(pattern, line) for line in child.errors)


def name_files(names: Iterable[str]) -> str:
  return ", ".join(sorted(set(names)))


def damage_all(bench: Bench, base: pathlib.Path) -> Problems:
  """The run must refuse, and leave what it has."""
  workdir = bench.new_workdir(base)
  for step in list_steps(workdir):
    files = (workdir / "checkpoints" / str(step)).glob("*/d/*")
    damage(max(files, key=lambda path: path.stat().st_size), "a bit flipped")
  metrics = (workdir / "metrics.jsonl").read_bytes()
  problems = bench.launch(workdir).expect(2)
  if (workdir / "metrics.jsonl").read_bytes() != metrics:
    problems.append("metrics.jsonl was changed")
  return bench.report(problems)


#### Strange folders


def inject_leftovers(bench: Bench) -> list[Row]:
  """What may lie in the folder besides whole checkpoints."""
  base = bench.stop_late("stopped")
  rows = []
  for scenario, prepare in LEFTOVERS.items():
    results = []
    for change in prepare:
      workdir = bench.new_workdir(base)
      change(workdir)
      results.append(functools.partial(bench.finish, workdir))
    rows.append(describe(scenario, bench.map(lambda finish: finish()[1], results)))
  return rows


def copy_newest(workdir: pathlib.Path, name: str, without: str) -> None:
  """A copy of the newest checkpoint called `name` that lacks the files that match `without`."""
  folder = workdir / "checkpoints"
  newest = folder / str(list_steps(workdir)[-1])
  shutil.copytree(newest, folder / name, ignore=shutil.ignore_patterns(without))


def cut_metrics(workdir: pathlib.Path) -> None:
  path = workdir / "metrics.jsonl"
  os.truncate(path, path.stat().st_size - 20)


def move_checkpoints(workdir: pathlib.Path) -> None:
  """Elsewhere, with a link in their place."""
  folder, elsewhere = workdir / "checkpoints", workdir.with_name(f"{workdir.name}-elsewhere")
  folder.rename(elsewhere)
  folder.symlink_to(elsewhere)


LEFTOVERS: dict[str, Sequence[Callable[[pathlib.Path], None]]] = {
  "an unfinished folder of a later step": (
    lambda workdir: (workdir / "checkpoints" / "9999").mkdir(),
    functools.partial(copy_newest, name="9998", without=SEAL),
    functools.partial(copy_newest, name="9997", without="d"),
  ),
  "a temporary folder left over": (
    functools.partial(copy_newest, name="39.orbax-checkpoint-tmp", without="d"),
    functools.partial(copy_newest, name="9999.orbax-checkpoint-tmp", without="*"),
    functools.partial(copy_newest, name="9999.orbax-checkpoint-tmp-17", without=SEAL),
  ),
  "metrics.jsonl cut or deleted": (
    cut_metrics,
    lambda workdir: (workdir / "metrics.jsonl").unlink(),
  ),
  "the folder of the run copied": (lambda workdir: None,),
  "checkpoints moved and linked": (move_checkpoints,),
}


#### Disks


def inject_full_disk(bench: Bench) -> list[Row]:
  """No file may grow; and, where we may mount one, a disk that is full."""
  base = bench.stop_late("stopped")
  rows = [describe("files limited (RLIMIT_FSIZE)", [limit_files(bench, base)])]
  with mount_disk(bench.folder / "disk") as disk:
    if disk is None:
      return [*rows, describe("disk full (tmpfs)", [], "not run: mounting is not permitted")]
    return [*rows, describe("disk full (tmpfs)", [fill_disk(bench, disk)])]


def limit_files(bench: Bench, base: pathlib.Path) -> Problems:
  workdir = bench.new_workdir(base)
  before = list_steps(workdir)[-1]
  child = bench.launch(workdir, limit=FILE_LIMIT)
  problems = expect_refusal(child)
  if before not in list_steps(workdir):
    problems.append(f"checkpoint {before} is gone")
  return bench.report(problems) + bench.finish(workdir)[1]


def expect_refusal(child: Child) -> Problems:
  """Exit status 2, and one line that says why."""
  problems = child.expect(2)
  if not problems and (len(child.errors) != 1 or not child.errors[0].startswith("error: ")):
    problems = [f"{len(child.errors)} lines instead of one error: {child.errors[:3]}"]
  return problems


@contextlib.contextmanager
def mount_disk(folder: pathlib.Path) -> Iterator[pathlib.Path | None]:
  """A small disk in memory; None where mounting is not permitted."""
  folder.mkdir()
  command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
  try:
    mounted = subprocess.run(command, capture_output=True).returncode == 0
  except OSError:
    mounted = False
  try:
    yield folder if mounted else None
  finally:
    if mounted:
      subprocess.run(["umount", str(folder)], check=True)


def fill_disk(bench: Bench, disk: pathlib.Path) -> Problems:
  """Fills it after the first checkpoint, and makes room again."""
  workdir, filler = disk / "run", disk / "filler"
  child = bench.launch(workdir)
  child.wait_until(lambda: bool(child.saved))
  with filler.open("wb") as file:
    os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - ROOM)
  problems = expect_refusal(child)
  if not list_steps(workdir):
    problems.append("no checkpoint is left")
  filler.unlink()
  return bench.report(problems) + bench.finish(workdir)[1]


def inject_removal(bench: Bench) -> list[Row]:
  """The folder vanishes while the run trains; it may end, or make its folder anew and go on."""
  workdir = bench.new_workdir()
  child = bench.launch(workdir)
  child.wait_until(lambda: bool(child.saved))
  away = workdir.rename(workdir.with_name(f"{workdir.name}-away"))
  shutil.rmtree(away)
  if child.wait_for_end() == 0:
    problems, notes = bench.compare(workdir), "made anew"
  else:
    problems, notes = expect_refusal(child), "refused to go on"
    shutil.rmtree(workdir, ignore_errors=True)
    problems += bench.finish(workdir)[1]
  return [describe("the run's folder removed", [bench.report(problems)], notes)]


#### Two at once


def inject_twins(bench: Bench) -> list[Row]:
  """Two processes start in one folder, at the same time or a little later."""
  results = [start_twins(bench, bench.random.choice((0, 0.5, 2, 5))) for _ in range(3)]
  return [describe("two processes in one folder", results, "the second is refused")]


def start_twins(bench: Bench, delay: float) -> Problems:
  """Exactly one must do the work; the other names it."""
  workdir = bench.new_workdir()
  children = [bench.launch(workdir)]
  time.sleep(delay)
  children.append(bench.launch(workdir))
  statuses = [child.wait_for_end() for child in children]
  if sorted(statuses) != [0, 2]:
    return bench.report([f"two at once ended with {statuses}: {children[1].errors}"])
  winner, loser = (children[statuses.index(status)] for status in (0, 2))
  problems = expect_refusal(loser)
  if not problems and str(winner.process.pid) not in loser.errors[0]:
    problems = [f"the refusal does not name process {winner.process.pid}: {loser.errors[0]}"]
  return bench.report(problems + bench.compare(workdir))


SCENARIOS: dict[str, Callable[[Bench], list[Row]]] = {
  "kills": inject_kills,
  "signals": inject_signals,
  "second": inject_second_signals,
  "damages": inject_damages,
  "leftovers": inject_leftovers,
  "disk": inject_full_disk,
  "removal": inject_removal,
  "twins": inject_twins,
}

if __name__ == "__main__":
  main()
