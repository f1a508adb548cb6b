"""Where a process joins others, and where not; the variables are those of real launchers."""

import subprocess
import sys

import pytest

from flax_cifar import errors
from flax_cifar.parallel import cluster
from tests.parallel import launch

SLURM = {
  "SLURM_JOB_ID": "4096",
  "SLURM_STEP_NODELIST": "node[01-02]",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "0",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}
TPU = {"TPU_WORKER_HOSTNAMES": "host-0,host-1", "TPU_WORKER_ID": "0"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "0", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}


def create(**changes):
  arguments = {
    "cluster": "auto",
    "coordinator": None,
    "num_processes": None,
    "process_id": None,
    "initialization_timeout": 5,
    "heartbeat_timeout": 5,
    "shutdown_timeout": 5,
    "stall_timeout": 60,
  }
  return cluster.Launch(**{**arguments, **changes})


FLAGS = {"coordinator": "host:1234", "num_processes": 2, "process_id": 0}


@pytest.mark.parametrize(
  ("changes", "environment", "found"),
  [
    ({}, {}, None),
    ({}, SLURM, "slurm"),
    ({}, {**SLURM, "SLURM_NTASKS": "1"}, None),
    ({}, {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),  # an interactive step
    # A shell of salloc and ssh to a node have some of the variables.
    *(({}, {k: v for k, v in SLURM.items() if k != left_out}, None) for left_out in SLURM),
    ({}, OPEN_MPI, "openmpi"),
    ({}, {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}, None),
    ({}, {**SLURM, **OPEN_MPI}, "openmpi"),  # whose daemon is a task of SLURM
    ({}, TPU, "tpu"),
    ({}, {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({}, {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, "tpu"),
    ({}, KUBERNETES, "kubernetes"),
    ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a notebook in a pod
    ({"cluster": "none"}, SLURM, None),
    ({"cluster": "tpu"}, {}, "tpu"),
    (FLAGS, {}, "flags"),
    (FLAGS, SLURM, "flags"),
  ],
)
def test_a_process_joins_others_only_where_there_is_no_doubt(changes, environment, found):
  assert cluster.find_cluster(create(**changes), environment) == found


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"cluster": "slrm"}, r"--cluster='slrm' is unknown.*'slurm'"),
    ({"coordinator": "host:1"}, r"--num_processes and --process_id is missing"),
    ({**FLAGS, "process_id": None}, r"--process_id is missing"),
    ({**FLAGS, "cluster": "slurm"}, r"--cluster='slurm' contradicts --coordinator"),
    ({**FLAGS, "coordinator": "host"}, r"--coordinator='host' .*HOST:PORT"),
    ({**FLAGS, "coordinator": "host:99999"}, r"--coordinator='host:99999' .*HOST:PORT"),
    ({**FLAGS, "num_processes": 0}, r"--num_processes=0 .*1 or more"),
    ({**FLAGS, "process_id": 2}, r"--process_id=2 .*from 0 to 1"),
    ({**FLAGS, "process_id": -1}, r"--process_id=-1 .*from 0 to 1"),
  ],
)
def test_a_wrong_launch_is_one_line(changes, message):
  with pytest.raises(errors.UserError, match=message):
    cluster.find_cluster(create(**changes), {})


def test_a_variable_that_is_no_number_is_named():
  with pytest.raises(errors.UserError, match=r"SLURM_NTASKS='2\(x2\)' .*a number"):
    cluster.find_cluster(create(), {**SLURM, "SLURM_NTASKS": "2(x2)"})


def test_a_job_of_kubernetes_without_its_package_says_what_to_do(monkeypatch):
  monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(errors.UserError, match=r"jax\[k8s\]"), cluster.joined(create(), KUBERNETES):
    pass


def run_alone(*flags):
  command = [sys.executable, "-m", "flax_cifar", "--config=quickstart:smoke", *flags]
  return subprocess.run(command, cwd=launch.ROOT, capture_output=True, text=True)


def test_open_mpi_without_mpi4py_says_what_to_do(monkeypatch):
  monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(errors.UserError, match="without the package mpi4py; pip install mpi4py"):
    cluster._get_arguments(create(), "openmpi", OPEN_MPI)


def test_an_error_of_a_package_that_jax_asks_is_one_line(monkeypatch):
  def fail(**arguments):
    raise FileNotFoundError(2, "No such file", "/var/run/secrets/namespace")

  monkeypatch.setattr(cluster.jax.distributed, "initialize", fail)
  message = r"'tpu' cannot be joined \(FileNotFoundError: .*namespace.*--cluster=none"
  with pytest.raises(errors.UserError, match=message):
    cluster._join(create(cluster="tpu"), "tpu", {})


def test_a_cluster_that_is_not_here_is_one_line():
  code = """
import os
from flax_cifar.parallel import cluster
from tests.parallel import test_cluster
with cluster.joined(test_cluster.create(cluster="slurm"), os.environ):
  pass
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  last = done.stderr.strip().splitlines()[-1]
  assert "UserError: the cluster 'slurm' cannot be joined (KeyError: 'SLURM_JOB_ID')" in last


@pytest.mark.parametrize(
  ("message", "is_loss"),
  [
    ("FAILED_PRECONDITION: Gloo all-reduce failed: Connection closed by peer", True),
    ("UNAVAILABLE: the coordination service has gone", True),
    ("RESOURCE_EXHAUSTED: Out of memory", False),
    ("INVALID_ARGUMENT: Disallowed host-to-device transfer", False),
    ("UNIMPLEMENTED: x", False),
  ],
)
def test_only_what_another_start_may_cure_is_a_loss(monkeypatch, message, is_loss):
  monkeypatch.setattr(cluster.jax, "process_count", lambda: 2)
  assert cluster.is_loss(cluster.jax.errors.JaxRuntimeError(message)) is is_loss


def test_others_that_do_not_come_are_status_75():
  flags = [f"--coordinator=127.0.0.1:{launch.find_port()}", "--num_processes=2", "--process_id=1"]
  ended = run_alone(*flags, "--initialization_timeout=1")
  assert ended.returncode == 75
  assert "start all of them again" in ended.stderr


def test_a_mistake_in_the_launch_is_one_line_and_status_2():
  ended = run_alone("--num_processes=2")
  assert ended.returncode == 2
  assert ended.stderr.count("\n") == 1
  assert "--coordinator and --process_id is missing" in ended.stderr
