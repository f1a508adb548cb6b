"""Order and batches as pure functions of (seed, epoch, step)."""

import numpy as np
import pytest

from flax_cifar import errors
from flax_cifar.data import batches as batches_lib
from flax_cifar.data import dataset


def split(count=10):
  """Every pixel of image i, and its label, are i."""
  values = np.arange(count)
  images = np.broadcast_to(values[:, None, None, None], (count, 4, 4, 3)).astype(np.uint8)
  return dataset.Split(images, values.astype(np.int32))


class AddNoise:
  """An augmentation whose noise depends on its stream only."""

  def __call__(self, image, stream):
    return image + np.random.default_rng(stream).integers(100, dtype=np.uint8)


def batches(count=10, batch_size=3, epochs=4, seed=0, augment=None):
  return batches_lib.TrainBatches(
    split(count), batch_size=batch_size, total_epochs=epochs, seed=seed, augment=augment
  )


def test_permutation_depends_on_seed_and_epoch():
  orders = [
    tuple(batches_lib.epoch_permutation(seed=seed, epoch=epoch, num_examples=50))
    for seed in (0, 1)
    for epoch in (0, 1)
  ]
  assert len(set(orders)) == 4
  assert all(sorted(order) == list(range(50)) for order in orders)
  assert orders[0] == tuple(batches_lib.epoch_permutation(seed=0, epoch=0, num_examples=50))


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
  with pytest.raises(errors.UserError, match=r"batch_size=11 .* at most the 10 training images"):
    batches(batch_size=11)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 16])
def test_padded_batches_cover_the_split_once(batch_size):
  parts = list(batches_lib.padded_batches(split(), batch_size))
  assert {part["image"].shape for part in parts} == {(batch_size, 4, 4, 3)}
  mask = np.concatenate([part["mask"] for part in parts]).astype(bool)
  labels = np.concatenate([part["label"] for part in parts])
  np.testing.assert_array_equal(labels[mask], np.arange(10))
