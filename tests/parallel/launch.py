"""Starts the processes of a run on this machine, which meet at a port of the loopback."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
HEARTBEAT_SECONDS = 4
LIMIT_SECONDS = 240  # of a wait; a process that takes longer hangs
FLAGS = (
  f"--heartbeat_timeout={HEARTBEAT_SECONDS}",
  "--initialization_timeout=120",
  "--shutdown_timeout=30",
)


def find_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


class Launch:
  """Processes that have been started; leaving it kills those that still run."""

  def __init__(self, plan, *, processes: int, devices: int, flags=()):
    coordinator = f"127.0.0.1:{find_port()}"
    variables = {
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": str(devices),
      "PYTHONPATH": str(ROOT),
      "XLA_FLAGS": "",  # pytest's own asks for four devices
    }
    worker = [sys.executable, "-m", "tests.parallel.worker", json.dumps(plan), *FLAGS, *flags]
    together = [f"--coordinator={coordinator}", f"--num_processes={processes}"]
    self.processes = [
      subprocess.Popen(
        [*worker, *together, f"--process_id={number}"],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for number in range(processes)
    ]

  def __enter__(self) -> "Launch":
    return self

  def __exit__(self, *_) -> None:
    for process in self.processes:
      with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
      process.wait()
      process.stdout.close()
      process.stderr.close()

  def wait(self) -> list[tuple[int, str, str]]:
    """The status, the output and the errors of each process."""
    return [self.wait_for(number) for number in range(len(self.processes))]

  def wait_for(self, number: int) -> tuple[int, str, str]:
    """The status, the output and the errors of one process."""
    text = self.processes[number].communicate(timeout=LIMIT_SECONDS)
    return self.processes[number].returncode, *text


def wait_for_step(workdir: pathlib.Path, step: int, process: int = 0) -> None:
  """Waits until a process has begun `step` of the run in `workdir`."""
  path, started = pathlib.Path(f"{workdir}.steps-{process}"), time.monotonic()
  while not path.exists() or int((path.read_text().split() or [0])[-1]) < step:
    assert time.monotonic() - started < LIMIT_SECONDS, f"no step {step} within {LIMIT_SECONDS} s"
    time.sleep(0.02)
