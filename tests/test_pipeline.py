"""Order and batches as pure functions of (seed, epoch, step)."""

import signal
import subprocess
import sys

import numpy as np
import pytest

from flax_cifar.data.dataset import Split
from flax_cifar.data.pipeline import (
  TrainBatches,
  create_normalize,
  epoch_permutation,
  iterate,
  padded_batches,
)
from flax_cifar.errors import UserError


def split(count=10):
  """Image i holds the value i everywhere, and so does its label."""
  values = np.arange(count)
  images = np.broadcast_to(values[:, None, None, None], (count, 4, 4, 3)).astype(np.uint8)
  return Split(images, values.astype(np.int32))


class AddNoise:
  """An augmentation that shows its stream."""

  def __call__(self, image, stream):
    return image + np.random.default_rng(stream).integers(100, dtype=np.uint8)


def batches(count=10, batch_size=3, epochs=4, seed=0, augment=None):
  return TrainBatches(
    split(count), batch_size=batch_size, total_epochs=epochs, seed=seed, augment=augment
  )


def test_permutation_depends_on_seed_and_epoch():
  orders = [
    tuple(epoch_permutation(seed=seed, epoch=epoch, num_examples=50))
    for seed in (0, 1)
    for epoch in (0, 1)
  ]
  assert len(set(orders)) == 4
  assert all(sorted(order) == list(range(50)) for order in orders)
  assert orders[0] == tuple(epoch_permutation(seed=0, epoch=0, num_examples=50))


def test_an_epoch_shows_no_example_twice_and_drops_only_the_remainder():
  source = batches()
  assert source.steps_per_epoch == 3
  assert len(source) == 12
  for epoch in range(4):
    labels = np.concatenate([source[3 * epoch + step]["label"] for step in range(3)])
    assert len(set(labels)) == 9


def test_images_keep_their_labels():
  for step in range(12):
    batch = batches()[step]
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
    assert batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_stream_is_the_same_for_any_number_of_workers(workers):
  source = batches(augment=AddNoise())
  stream = list(iterate(source, start_step=0, workers=workers))
  assert len(stream) == 12
  for step, batch in enumerate(stream):
    np.testing.assert_array_equal(batch["image"], source[step]["image"])
    np.testing.assert_array_equal(batch["label"], source[step]["label"])


def test_stream_starts_anywhere():
  source = batches(augment=AddNoise())
  tail = list(iterate(source, start_step=7, workers=0))
  assert len(tail) == 5
  np.testing.assert_array_equal(tail[0]["image"], source[7]["image"])


def test_augmentation_differs_between_epochs_and_examples():
  source = batches(augment=AddNoise())
  noise = {}
  for step in range(len(source)):
    batch = source[step]
    for image, label in zip(batch["image"], batch["label"], strict=True):
      noise.setdefault(int(label), []).append(int(image[0, 0, 0]) - int(label))
  assert all(len(set(draws)) > 1 for draws in noise.values() if len(draws) > 2)
  assert len({draws[0] for draws in noise.values()}) > 5


def test_augmentation_of_an_example_does_not_depend_on_the_batch_size():
  def first_epoch(batch_size):
    source = batches(count=12, batch_size=batch_size, augment=AddNoise())
    steps = [source[step] for step in range(source.steps_per_epoch)]
    return {
      int(label): int(image[0, 0, 0])
      for batch in steps
      for image, label in zip(batch["image"], batch["label"], strict=True)
    }

  assert first_epoch(3) == first_epoch(4)


def test_batch_larger_than_the_data_is_an_error():
  with pytest.raises(UserError, match=r"batch_size=11 .* at most the 10 train images"):
    batches(batch_size=11)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 16])
def test_padded_batches_cover_the_split_once(batch_size):
  parts = list(padded_batches(split(), batch_size))
  assert {part["image"].shape for part in parts} == {(batch_size, 4, 4, 3)}
  mask = np.concatenate([part["mask"] for part in parts]).astype(bool)
  labels = np.concatenate([part["label"] for part in parts])
  np.testing.assert_array_equal(labels[mask], np.arange(10))


def test_normalize_is_albumentations():
  A = pytest.importorskip("albumentations")
  mean, std = (0.49, 0.48, 0.44), (0.24, 0.25, 0.26)
  images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
  expected = [A.Normalize(mean=mean, std=std)(image=image)["image"] for image in images]
  actual = np.asarray(create_normalize(mean, std, dtype=np.float32)(images))
  assert actual.dtype == np.float32
  np.testing.assert_allclose(actual, expected, atol=2e-6)
  exact = (images.astype(np.float64) / 255 - mean) / std
  np.testing.assert_allclose(actual, exact, atol=2e-6)


def test_normalize_refuses_a_zero_deviation():
  with pytest.raises(UserError, match=r"augment.std=\(0.0,"):
    create_normalize((0.5,) * 3, (0.0, 1.0, 1.0), dtype=np.float32)


KILLED = """
import os, signal
import numpy as np
from flax_cifar.data.dataset import Split
from flax_cifar.data.pipeline import TrainBatches, iterate
if __name__ == "__main__":
  split = Split(np.zeros((8, 4, 4, 3), np.uint8), np.zeros(8, np.int32))
  batches = TrainBatches(split, batch_size=2, total_epochs=9, seed=0, augment=None)
  stream = iterate(batches, start_step=0, workers=1)
  print(next(stream)["label"].shape, flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_killed_run(tmp_path):
  """They share its output, which is read to its end here."""
  (tmp_path / "killed.py").write_text(KILLED)
  command = [sys.executable, str(tmp_path / "killed.py")]
  done = subprocess.run(command, capture_output=True, text=True, timeout=100)
  assert done.returncode == -signal.SIGKILL
  assert done.stdout == "(2,)\n"
