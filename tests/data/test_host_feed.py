"""Batches made by grain: any number of workers, any start, no process left behind."""

import multiprocessing
import signal
import subprocess
import sys

import numpy as np
import pytest

from flax_cifar import errors
from flax_cifar.data import host_feed
from flax_cifar.parallel import mesh as mesh_lib
from tests.data import test_batches


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_is_the_same_for_any_number_of_workers(workers):
  source = test_batches.batches(augment=test_batches.AddNoise())
  stream = list(host_feed.iterate_batches(source, start_step=0, workers=workers))
  assert len(stream) == 12
  for step, batch in enumerate(stream):
    np.testing.assert_array_equal(batch["image"], source[step]["image"])
    np.testing.assert_array_equal(batch["label"], source[step]["label"])


def test_stream_starts_anywhere():
  source = test_batches.batches(augment=test_batches.AddNoise())
  tail = list(host_feed.iterate_batches(source, start_step=7, workers=0))
  assert len(tail) == 5
  np.testing.assert_array_equal(tail[0]["image"], source[7]["image"])


KILLED = """
import os, signal
import numpy as np
from flax_cifar.data.dataset import Split
from flax_cifar.data.batches import TrainBatches
from flax_cifar.data.host_feed import iterate_batches
if __name__ == "__main__":
  split = Split(np.zeros((8, 4, 4, 3), np.uint8), np.zeros(8, np.int32))
  batches = TrainBatches(split, batch_size=2, total_epochs=9, seed=0, augment=None)
  stream = iterate_batches(batches, start_step=0, workers=1)
  print(next(stream)["label"].shape, flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_killed_run(tmp_path):
  """The workers share its output, so `subprocess.run` returns only after they have ended."""
  (tmp_path / "killed.py").write_text(KILLED)
  command = [sys.executable, str(tmp_path / "killed.py")]
  done = subprocess.run(command, capture_output=True, text=True, timeout=100)
  assert done.returncode == -signal.SIGKILL
  assert done.stdout == "(2,)\n"


def test_a_worker_that_is_killed_is_one_line():
  feed = host_feed.HostFeed(
    lambda rows: test_batches.batches(epochs=200),
    batch_size=3,
    workers=1,
    mesh=mesh_lib.create_mesh(1),
  )
  next(feed.chunks(range(600)))
  for worker in multiprocessing.active_children():
    worker.kill()
  with pytest.raises(errors.UserError, match=r"augment\.workers has ended .*__name__"):
    list(feed.chunks(range(1, 600)))
  feed.close()
