"""How the processes of a run find each other, and how they leave, by `jax.distributed`.

A process joins others where the flags of its launch say so, or where its environment leaves no
doubt. It never joins just in case: where nobody answers, that would end in an error.
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from flax_cifar import environment as environment_lib
from flax_cifar import errors
from flax_cifar.parallel import watchdog

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
# Errors of XLA that another start would meet again.
OURS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
GRACE_SECONDS = 2.0  # process 0 leaves after the others: it has the service that watches them all
LOST = (
  "another process of the run has ended or lost contact; start all of them again, and they go on "
  "from the last checkpoint"
)


@dataclasses.dataclass(frozen=True)
class Launch:
  """How this process was launched, by its flags; None leaves it to the environment.

  Attributes:
    cluster: "auto" joins where the environment leaves no doubt; "none" never; a key of CLUSTERS
      insists on that one.
    coordinator: HOST:PORT of process 0.
    num_processes: how many there are.
    process_id: which one this is, from 0.
    initialization_timeout: seconds to wait for the others at the start.
    heartbeat_timeout: seconds of silence after which a process counts as dead.
    shutdown_timeout: seconds to wait for the others at the end.
    stall_timeout: seconds without a finished call after which all give up, see `watchdog`.
  """

  cluster: str
  coordinator: str | None
  num_processes: int | None
  process_id: int | None
  initialization_timeout: int
  heartbeat_timeout: int
  shutdown_timeout: int
  stall_timeout: int


# ---- Where to join


def _count(environment: Mapping[str, str], name: str) -> int:
  value = environment.get(name, "1")
  errors.require(value.isdecimal(), name, value, "a number")
  return int(value)


def _is_slurm(environment: Mapping[str, str]) -> bool:
  """Whether this is a task of several of a step.

  A shell of `salloc` may have the variables of the job, but is a step of one task; ssh to a node of
  a job has some of them only.
  """
  step = "SLURM_STEP_NUM_TASKS"
  tasks = _count(environment, step if step in environment else "SLURM_NTASKS")
  return all(name in environment for name in SLURM) and tasks > 1


def _is_open_mpi(environment: Mapping[str, str]) -> bool:
  return _count(environment, "OMPI_COMM_WORLD_SIZE") > 1


def _is_tpu(environment: Mapping[str, str]) -> bool:
  names = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
  several = any("," in environment.get(name, "") for name in names)
  return several or _count(environment, "MEGASCALE_NUM_SLICES") > 1


def _is_kubernetes(environment: Mapping[str, str]) -> bool:
  return "JOB_COMPLETION_INDEX" in environment and "KUBERNETES_SERVICE_HOST" in environment


# Open MPI first: on other nodes its ranks inherit the variables of the SLURM task that starts them.
CLUSTERS: dict[str, Callable[[Mapping[str, str]], bool]] = {
  "openmpi": _is_open_mpi,
  "slurm": _is_slurm,
  "tpu": _is_tpu,
  "kubernetes": _is_kubernetes,
}
CHOICES = ("auto", "none", *CLUSTERS)


def find_cluster(launch: Launch, environment: Mapping[str, str]) -> str | None:
  """The source of the launch: "flags" or a key of CLUSTERS; None for a single process.

  Raises:
    UserError: the flags are incomplete or contradict each other.
  """
  errors.choose("--cluster", launch.cluster, dict.fromkeys(CHOICES))
  given = {
    "--coordinator": launch.coordinator,
    "--num_processes": launch.num_processes,
    "--process_id": launch.process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if len(missing) < len(given):
    _check_flags(launch, missing)
    return "flags"
  if launch.cluster != "auto":
    return launch.cluster if launch.cluster != "none" else None
  return next((name for name, is_here in CLUSTERS.items() if is_here(environment)), None)


def _check_flags(launch: Launch, missing: list[str]) -> None:
  if missing:
    raise errors.UserError(
      f"{' and '.join(missing)} is missing; several processes need --coordinator=HOST:PORT, "
      "--num_processes and --process_id."
    )
  if launch.cluster != "auto":
    raise errors.UserError(
      f"--cluster={launch.cluster!r} contradicts --coordinator; leave one of them out."
    )
  host, _, port = (launch.coordinator or "").rpartition(":")
  fits = bool(host) and port.isdecimal() and 0 < int(port) < 2**16
  errors.require(fits, "--coordinator", launch.coordinator, "HOST:PORT of process 0")
  count, number = launch.num_processes or 0, launch.process_id
  errors.require(count > 0, "--num_processes", count, "1 or more")
  expected = f"from 0 to {count - 1}"
  errors.require(number is not None and 0 <= number < count, "--process_id", number, expected)


# ---- Joining


@contextlib.contextmanager
def joined(launch: Launch, environment: Mapping[str, str]) -> Iterator[None]:
  """Joins the other processes, if there are any; within it only process 0 prints.

  Raises:
    UserError: the launch is wrong.
    Lost: the others do not answer in time, or one of them is lost.
  """
  found = find_cluster(launch, environment)
  if found is None:
    yield
    return
  leave_at_abort()
  _join(launch, found, environment)
  if jax.process_index() > 0:
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, open to the end
  print(
    f"joined {jax.process_count()} processes, found by {found}; process 0 on "
    f"{socket.gethostname()} coordinates them",
    flush=True,
  )
  with watchdog.watch(launch.stall_timeout):
    try:
      yield
    except Exception as error:
      if not is_loss(error):
        raise
      raise errors.Lost(f"{LOST} ({errors.shorten(error)})") from error


def _join(launch: Launch, found: str, environment: Mapping[str, str]) -> None:
  arguments = _get_arguments(launch, found, environment)
  # Its handler of SIGTERM would take the place of ours.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      **arguments,
      initialization_timeout=launch.initialization_timeout,
      heartbeat_timeout_seconds=launch.heartbeat_timeout,
      shutdown_timeout_seconds=launch.shutdown_timeout,
    )
  except jax.errors.JaxRuntimeError as error:
    raise errors.Lost(
      f"the processes did not find each other within {launch.initialization_timeout} s "
      f"({errors.shorten(error)}); start all of them again, or raise --initialization_timeout"
    ) from error
  except Exception as error:  # of the packages that JAX asks, too
    reason = f"{type(error).__name__}: {errors.shorten(error)}"
    raise errors.UserError(
      f"the cluster {found!r} cannot be joined ({reason}); pass --coordinator, "
      "--num_processes and --process_id, or --cluster=none to train in this process alone."
    ) from error
  environment_lib.check_devices()


def _require_package(name: str, remedy: str) -> None:
  if importlib.util.find_spec(name) is None:
    raise errors.UserError(
      f"the other processes cannot be found without the package {name}; pip install {remedy}, pass "
      "--coordinator, --num_processes and --process_id, or --cluster=none to train in this process "
      "alone."
    )


def _get_arguments(launch: Launch, found: str, environment: Mapping[str, str]) -> dict[str, Any]:
  """The arguments of `jax.distributed.initialize` that say who the others are."""
  if found == "kubernetes":
    _require_package("kubernetes", "'jax[k8s]'")
  if found == "slurm":
    return {"cluster_detection_method": "slurm"}
  if found == "openmpi":  # since version 5 it does not tell where process 0 is
    legacy = "OMPI_MCA_orte_hnp_uri" in environment
    if not legacy:
      _require_package("mpi4py", "mpi4py")
    return {"cluster_detection_method": "ompi" if legacy else "mpi4py"}
  if found != "flags":
    return {}
  host = (launch.coordinator or "").rpartition(":")[0]
  arguments = {
    "coordinator_address": launch.coordinator,
    "num_processes": launch.num_processes,
    "process_id": launch.process_id,
    "cluster_detection_method": "deactivate",
  }
  # By default the service would listen on every network of the machine.
  if host in LOOPBACK:
    arguments["coordinator_bind_address"] = launch.coordinator
  return arguments


# ---- Leaving


def is_loss(error: BaseException | None) -> bool:
  """Whether `error`, or what led to it, says that another process is lost."""
  if error is None or jax.process_count() == 1:
    return False
  of_jax = isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(OURS)
  of_gloo = isinstance(error, ValueError) and "Gloo" in str(error)  # CPUs exchange through it
  return of_jax or of_gloo or is_loss(error.__cause__ or error.__context__)


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


@_Handler
def _leave(signum: int) -> None:
  del signum
  os.write(watchdog.STDERR, f"error: {LOST}\n".encode())
  os._exit(os.EX_TEMPFAIL)


def leave_at_abort() -> None:
  """Makes SIGABRT end this process with a line and status 75.

  JAX calls `abort` from a thread of its own once a process is lost. Python's own handlers would
  run in the main thread, which may be waiting for that process.
  """
  libc = ctypes.CDLL(None)
  libc.signal.argtypes = [ctypes.c_int, _Handler]
  libc.signal.restype = ctypes.c_void_p
  libc.signal(signal.SIGABRT, _leave)


@contextlib.contextmanager
def leave_together() -> Iterator[None]:
  """Ends this process at once when its work raises, so that no other one waits for it.

  At a regular end the processes wait for each other.
  """
  try:
    yield
  except BaseException as error:
    if not jax.distributed.is_initialized():
      raise
    status: Any = 1
    if isinstance(error, SystemExit):
      status = error.code
    else:
      traceback.print_exc()
    sys.stdout.flush()
    if jax.process_index() == 0:
      time.sleep(GRACE_SECONDS)
    os._exit(status if isinstance(status, int) else 1)
