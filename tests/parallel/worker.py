"""One of several processes that make tiny runs together; tests.parallel.launch starts it.

Command     python -m tests.parallel.worker PLAN [flags of main.py]

PLAN is a JSON list of runs, {"workdir", "data", "changes", "stop", "hang"}: the process `stop[0]`
gets SIGTERM at step `stop[1]`, the process `hang[0]` sleeps forever at step `hang[1]`. Each step
is appended to `WORKDIR.steps-PROCESS`.
"""

import contextlib
import json
import os
import pathlib
import signal
import sys
import time
from unittest import mock

from flax_cifar import environment


def main() -> None:
  environment.apply_settings()
  plan = json.loads(sys.argv.pop(1))

  from flax_cifar import __main__, models, train
  from tests import tiny

  models.MODELS["tiny"] = tiny.TinyNet

  def make_runs(config, workdir) -> None:
    del config, workdir
    for run in plan:
      workdir = pathlib.Path(run["workdir"])
      changes = {key: tuple(v) if isinstance(v, list) else v for key, v in run["changes"].items()}
      config = tiny.get_config(run["data"], num_devices=0, **changes)
      with watched_steps(run):
        train.train_and_evaluate(config, workdir)

  with mock.patch.object(__main__, "train_here", make_runs):
    __main__.run([*sys.argv[1:], "--config=quickstart:smoke"])


@contextlib.contextmanager
def watched_steps(run):
  """Reports the steps of the feeds, and stops or hangs this process at one of them."""
  import jax

  from flax_cifar.data import device_feed, host_feed

  number = jax.process_index()
  report = pathlib.Path(f"{run['workdir']}.steps-{number}")

  def report_chunks(chunks):
    def reported(self, steps):
      begun = steps.start
      for length, inputs in chunks(self, steps):
        begun += length
        with report.open("a", encoding="utf-8") as file:
          file.write(f"{begun}\n")
        if [number, begun] == run.get("stop"):
          os.kill(os.getpid(), signal.SIGTERM)
        if [number, begun] == run.get("hang"):
          time.sleep(1000)
        time.sleep(run.get("pause", 0))
        yield length, inputs

    return reported

  with contextlib.ExitStack() as stack:
    for feed in (device_feed.DeviceFeed, host_feed.HostFeed):
      stack.enter_context(mock.patch.object(feed, "chunks", report_chunks(feed.chunks)))
    yield


if __name__ == "__main__":
  main()
