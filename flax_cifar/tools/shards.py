"""A sweep over many machines: which of its runs are this process's, and submission to SLURM.

Submission is by submitit, which is optional: pip install 'flax_cifar[slurm]'.
"""

import ast
import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from flax_cifar import errors
from flax_cifar.tools import jobs as jobs_lib

ENGINES = ("here", "slurm")


@dataclasses.dataclass(frozen=True)
class Shard:
  """Part `index` (from 0) of `count`: the items index, index + count, ... of a list."""

  index: int
  count: int

  def select(self, items: Sequence[Any]) -> list[Any]:
    """The items of this part.

    >>> Shard(1, 3).select("abcde")
    ['b', 'e']
    """
    return list(items[self.index :: self.count])


WHOLE = Shard(0, 1)


def find_shard(text: str | None, environment: Mapping[str, str]) -> Shard:
  """The shard I/N of --shard; without it that of a SLURM array, SLURM tasks or an indexed job.

  Raises:
    UserError: `text` or a variable is not as it should be.
  """
  if text is not None:
    shard = Shard(*map(_to_int, text.split("/"))) if text.count("/") == 1 else Shard(0, 0)
    fits = 0 <= shard.index < shard.count
    errors.require(fits, "--shard", text, "I/N with I from 0 to N - 1")
    return shard
  number = {name: _to_int(value) for name, value in environment.items() if name.isupper()}
  if "SLURM_ARRAY_TASK_ID" in environment:
    return _find_in_array(number)
  # A shell of `salloc` is a step of one task, and may have the number of tasks of its job.
  tasks = number.get("SLURM_STEP_NUM_TASKS", number.get("SLURM_NTASKS", 1))
  if tasks > 1 and "SLURM_STEP_ID" in environment:
    return _create_shard(number, "SLURM_PROCID", "SLURM_NTASKS")
  if "JOB_COMPLETION_INDEX" in environment:
    if number.get("JOB_COMPLETIONS", 0) < 1:
      raise errors.UserError(
        "this is an indexed Kubernetes job, which does not tell its size; set JOB_COMPLETIONS in "
        "its manifest, or pass --shard=I/N."
      )
    return _create_shard(number, "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS")
  return WHOLE


def _create_shard(number: Mapping[str, int], index: str, count: str) -> Shard:
  """The shard that two variables tell; a UserError that quotes them if they make none."""
  shard = Shard(number.get(index, -1), number.get(count, -1))
  if not 0 <= shard.index < shard.count:
    raise errors.UserError(
      f"{index}={shard.index} of {count}={shard.count} is no part of a sweep; pass --shard=I/N."
    )
  return shard


def _find_in_array(number: Mapping[str, int]) -> Shard:
  """The shard of a task of a SLURM array; the array has to be whole, 0, 1, 2 and so on.

  Of a part of one, such as --array=3 to repeat a task, SLURM does not tell the size of the whole.
  """
  index, last, count = (
    number.get(f"SLURM_ARRAY_TASK_{name}", -1) for name in ("ID", "MAX", "COUNT")
  )
  if not 0 <= index <= last == count - 1:
    raise errors.UserError(
      f"this is task {index} of a SLURM array of {count} tasks up to {last}, which is not "
      "--array=0-N; pass --shard=I/N of the whole sweep."
    )
  return Shard(index, count)


def _to_int(text: str) -> int:
  """The number that `text` holds; -1 if it holds none."""
  return int(text) if text.isascii() and text.isdecimal() else -1


# ---- Submission


class Task:
  """A run as a process of its own; submitit calls it on the machine that the scheduler chooses."""

  def __init__(self, job: jobs_lib.Job):
    self._job = job
    self._process: subprocess.Popen[bytes] | None = None

  def __call__(self) -> int:
    """Runs the job to its end.

    Raises:
      JobFailed: its status is not 0.
    """
    self._process = subprocess.Popen(self._job.command, process_group=0)
    _wait_for_end(self._process)
    status = self._process.wait()
    if status:
      raise jobs_lib.JobFailed(self._job, status if status > 0 else 128 - status)
    return status

  def checkpoint(self) -> Any:
    """Lets the run save and asks for another machine; submitit calls it before a preemption."""
    import submitit

    if self._process:
      self._process.send_signal(signal.SIGTERM)
      _wait_for_end(self._process)
    return submitit.helpers.DelayedSubmission(Task(self._job))


def _wait_for_end(process: subprocess.Popen[bytes]) -> None:
  """Waits without the lock of `process.wait`: a signal's handler may wait too."""
  with contextlib.suppress(ChildProcessError):  # its status has been collected
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def parse_parameters(texts: Sequence[str]) -> dict[str, Any]:
  """{"timeout_min": 60, "slurm_partition": "gpu"} of ["timeout_min=60", "slurm_partition=gpu"].

  Raises:
    UserError: one is not KEY=VALUE.
  """
  parameters: dict[str, Any] = {}
  for text in texts:
    key, equals, value = text.partition("=")
    errors.require(bool(key and equals), "--slurm", text, "KEY=VALUE, a parameter of submitit")
    try:
      parameters[key] = ast.literal_eval(value)
    except (ValueError, SyntaxError):  # a plain word
      parameters[key] = value
  return parameters


def check_parameters(parameters: Mapping[str, Any]) -> None:
  """Raises a UserError without the time of a run: submitit would end each after five minutes."""
  if not parameters.keys() & {"timeout_min", "slurm_timeout_min", "slurm_time"}:
    raise errors.UserError(
      "--engine=slurm needs the minutes that a run may take, as --slurm=timeout_min=240."
    )


def submit(
  jobs: Sequence[jobs_lib.Job], folder: pathlib.Path, parameters: Mapping[str, Any]
) -> None:
  """Submits a task per job to SLURM, all as one array.

  Args:
    jobs: the runs.
    folder: for submitit's own files.
    parameters: of `submitit.AutoExecutor.update_parameters`.

  Raises:
    UserError: submitit is missing, there is no SLURM here, or a parameter is unknown.
  """
  try:
    import submitit
  except ImportError as error:
    raise errors.UserError(
      "--engine='slurm' needs submitit; pip install 'flax_cifar[slurm]'."
    ) from error
  try:
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
    executor.update_parameters(**parameters)
    with executor.batch():
      submitted = [executor.submit(Task(job)) for job in jobs]
  except Exception as error:  # submitit raises RuntimeError, NameError and its own
    raise errors.UserError(
      f"--engine='slurm' cannot submit ({errors.shorten(error)}); --slurm=KEY=VALUE sets the "
      "parameters of submitit."
    ) from error
  for job, task in zip(jobs, submitted, strict=True):
    print(f"submitted {job.name} as job {task.job_id}, log {task.paths.stdout}", flush=True)
