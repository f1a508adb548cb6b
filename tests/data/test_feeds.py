"""The feeds of the training steps: order, batches and chunks, on the host and on the device."""

import itertools
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar import errors
from flax_cifar.data import batches as batches_lib
from flax_cifar.data import dataset, device_feed, feeds, host_feed
from flax_cifar.data.augment import device, host
from flax_cifar.parallel import mesh as mesh_lib
from flax_cifar.parallel import seeds as seeds_lib

COUNT, BATCH = 22, 4  # five steps
FLIP = device.create_device_augment(
  ops=("horizontal_flip",), mean=(0, 0, 0), horizontal_flip={"p": 0.5}
)


def make_split():
  """The images are noise; the label is the number of the example."""
  images = np.random.default_rng(0).integers(0, 256, (COUNT, 4, 4, 3), np.uint8)
  return dataset.Split(images, np.arange(COUNT, dtype=np.int32))


def create(*, seed=0, num_seeds=1, augment=None, steps_per_call=1, devices=1):
  return device_feed.DeviceFeed(
    make_split(),
    batch_size=BATCH,
    keys=seeds_lib.create_keys(seed, num_seeds),
    augment=augment,
    steps_per_call=steps_per_call,
    mesh=mesh_lib.create_mesh(devices),
  )


def create_feed_of(steps, *, steps_per_call):
  """A feed of `steps` batches of one example."""
  return device_feed.DeviceFeed(
    dataset.Split(np.zeros((steps, 1, 1, 3), np.uint8), np.zeros(steps, np.int32)),
    batch_size=1,
    keys=seeds_lib.create_keys(0, 1),
    augment=None,
    steps_per_call=steps_per_call,
    mesh=mesh_lib.create_mesh(1),
  )


def get_orders(feed, epochs=3):
  starts = (feed.steps_per_epoch * epoch for epoch in range(epochs))
  return [np.asarray(next(feed.chunks(range(s, s + 1)))[1]["order"]) for s in starts]


def test_an_epoch_shows_no_example_twice():
  feed = create()
  assert feed.steps_per_epoch == 5
  for order in get_orders(feed):
    assert order.shape == (5, BATCH)
    assert len(set(order.ravel())) == 5 * BATCH
    assert order.min() >= 0
    assert order.max() < COUNT


def test_order_depends_only_on_seed_and_epoch():
  orders = [order.tobytes() for seed in (0, 1) for order in get_orders(create(seed=seed))]
  assert len(set(orders)) == 6
  assert orders[3:] == [order.tobytes() for order in get_orders(create(seed=1, devices=4))]
  drawn = device_feed.draw_order(jax.random.key(1), 2, num_examples=COUNT, batch_size=BATCH)
  assert drawn.dtype == np.int32
  assert orders[5] == np.asarray(drawn).tobytes()


def test_every_position_gets_every_example():
  """The order is uniform: for 400 epochs of 22 examples chi-square(21) is below 60 at 1e-5."""
  draw = jax.jit(
    jax.vmap(
      lambda epoch: device_feed.draw_order(
        jax.random.key(3), epoch, num_examples=COUNT, batch_size=1
      )
    )
  )
  orders = np.asarray(draw(np.arange(400)))[:, :, 0]
  for position in range(COUNT):
    counts = np.bincount(orders[:, position], minlength=COUNT)
    assert ((counts - 400 / COUNT) ** 2 / (400 / COUNT)).sum() < 60


@pytest.mark.parametrize(
  ("steps_per_call", "steps", "lengths"),
  [
    (1, range(5, 10), [1, 1, 1, 1, 1]),
    (3, range(5, 10), [3, 2]),
    (3, range(6, 10), [3, 1]),
    (3, range(8, 10), [2]),
    (sys.maxsize, range(0, 5), [5]),
    (sys.maxsize, range(4, 5), [1]),
    (1, range(5, 5), []),
  ],
)
def test_chunks_cover_the_steps(steps_per_call, steps, lengths):
  chunks = list(create(steps_per_call=steps_per_call).chunks(steps))
  assert [length for length, _ in chunks] == lengths
  assert len({id(inputs["order"]) for _, inputs in chunks}) <= 1  # drawn once per epoch


def test_saves_within_epochs_need_few_programs():
  """Each chunk length needs a program: here 390 steps, saved every 100, or stopped anywhere."""
  steps = 390
  feed = create_feed_of(steps, steps_per_call=sys.maxsize)
  cuts = sorted({*range(0, 10 * steps, 100), *range(0, 10 * steps, steps), 123, 1711})
  lengths = []
  for start, end in itertools.pairwise(cuts):
    made = [length for length, _ in feed.chunks(range(start, end))]
    assert sum(made) == end - start
    lengths += made
  assert set(lengths) <= {2**power for power in range(9)}
  assert [length for length, _ in feed.chunks(range(steps, 2 * steps))] == [steps]
  feed = create_feed_of(steps, steps_per_call=100)
  assert [length for length, _ in feed.chunks(range(steps))] == [100, 100, 100, 90]


@pytest.mark.parametrize(("platform", "whole"), [("cpu", False), ("gpu", True), ("tpu", True)])
def test_an_epoch_is_one_call_except_on_a_cpu(platform, whole):
  steps = device_feed.choose_steps_per_call(platform)
  assert create(steps_per_call=steps).steps_per_call == (5 if whole else 1)


@pytest.mark.parametrize("devices", [1, 4])
def test_batches_follow_the_order_and_keep_their_labels(devices):
  """The augmentation depends on the number of the example, not on the batch."""
  feed, split, key = create(augment=FLIP, devices=devices), make_split(), jax.random.key(9)
  mesh = mesh_lib.create_mesh(devices)
  get_batch = jax.jit(
    seeds_lib.map_seeds(feed.get_batch, mesh, num_seeds=1, in_axes=(None, None, None))
  )
  for step in (0, 3, 9):
    epoch, position = divmod(step, 5)
    _, inputs = next(feed.chunks(range(step, step + 1)))
    batch = get_batch(key, step, inputs)
    index = get_orders(feed)[epoch][position]
    all_augmented = np.asarray(FLIP(split.images, key, jnp.int32(epoch), jnp.arange(COUNT)))
    np.testing.assert_array_equal(batch["label"], index)
    np.testing.assert_array_equal(batch["image"], all_augmented[index])
    shards = {shard.data.shape[0] for shard in batch["image"].addressable_shards}
    assert shards == {BATCH // devices}
  assert (all_augmented != split.images).any()


def test_each_seed_has_its_own_order():
  both = get_orders(create(seed=4, num_seeds=2))
  for number in range(2):
    for order, own in zip(both, get_orders(create(seed=4 + number)), strict=True):
      np.testing.assert_array_equal(order[number], own)


@pytest.mark.parametrize("number", [0, 1])
def test_batch_at_returns_any_batch(number):
  """It does so for one of several seeds, too."""
  split = make_split()
  one, both = create(seed=number, augment=FLIP), create(augment=FLIP, num_seeds=2)
  for step in range(2 * one.steps_per_epoch):
    found = both.batch_at(step, number)
    [(_, inputs)] = one.chunks(range(step, step + 1))
    batch = one.get_batch(jax.random.key(number), jnp.int32(step), inputs)
    for name in ("image", "label"):
      np.testing.assert_array_equal(found[name], batch[name])
    np.testing.assert_array_equal(found["label"], split.labels[found["example"]])


def test_the_host_feed_continues_at_any_step():
  batches = batches_lib.TrainBatches(
    make_split(), batch_size=BATCH, total_epochs=2, seed=0, augment=None
  )
  mesh = mesh_lib.create_mesh(1)
  feed = host_feed.HostFeed(lambda rows: batches, batch_size=BATCH, workers=0, mesh=mesh)
  chunks = [*feed.chunks(range(3, 5)), *feed.chunks(range(5, 10))]
  feed.close()
  assert [length for length, _ in chunks] == [1] * 7
  for step, (_, inputs) in enumerate(chunks, 3):
    np.testing.assert_array_equal(inputs["label"], batches[step]["label"])
    np.testing.assert_array_equal(inputs["image"], batches[step]["image"])
  found = feed.batch_at(7)
  np.testing.assert_array_equal(found["image"], batches[7]["image"])
  np.testing.assert_array_equal(found["image"], make_split().images[found["example"]])


class AddNoise:
  """Seeds its state in each call, as Albumentations does, but is slow."""

  def __call__(self, image, stream):
    self.generator = np.random.default_rng(stream)
    time.sleep(1e-3)
    return image ^ self.generator.integers(256, size=image.shape, dtype=np.uint8)


def test_batch_at_of_the_host_feed_works_while_grain_loads(monkeypatch):
  monkeypatch.setattr(host, "create_host_augment", lambda **arguments: AddNoise())
  order = {"batch_size": BATCH, "total_epochs": 3, "seed": 0}
  feed = feeds.create_feed(
    make_split(),
    backend="albumentations",
    **order,
    num_seeds=1,
    steps_per_call=1,
    workers=0,
    mesh=mesh_lib.create_mesh(1),
    ops=(),
    op_arguments={},
    mean=(0.5,) * 3,
  )
  expected = batches_lib.TrainBatches(make_split(), **order, augment=AddNoise())
  for step, (_, inputs) in enumerate(feed.chunks(range(15))):
    for found, at in ((feed.batch_at(step), step), (feed.example_inputs(), 0), (inputs, step)):
      np.testing.assert_array_equal(found["image"], expected[at]["image"])
  feed.close()


def test_a_batch_larger_than_the_data_is_an_error():
  with pytest.raises(errors.UserError, match=r"batch_size=23 .* at most the 22 training images"):
    device_feed.DeviceFeed(
      make_split(),
      batch_size=23,
      keys=seeds_lib.create_keys(0, 1),
      augment=None,
      steps_per_call=1,
      mesh=mesh_lib.create_mesh(1),
    )


def test_training_does_not_import_the_libraries_of_the_host_feed():
  """Their import takes most of a second."""
  code = "import sys, flax_cifar.train; print([m for m in sys.argv[1:] if m in sys.modules])"
  command = [sys.executable, "-c", code, "albumentations", "cv2", "grain"]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"
