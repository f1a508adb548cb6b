"""Tiny runs: how tests start, interrupt and compare them."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np

from flax_cifar import train
from flax_cifar.data import device_feed, host_feed
from tests import tiny

STEPS_PER_EPOCH = 5  # 96 - 16 training images in batches of 16
LAST_STEP = 3 * STEPS_PER_EPOCH
# The state has every optional part; no epoch improves by half, so the learning rate drops.
AVERAGE_AND_PLATEAU = {
  "ema.decay": 0.9,
  "schedule.name": "plateau",
  "schedule.plateau.patience": 0,
  "schedule.plateau.threshold": 0.5,
}


def run(workdir, data, **changes):
  """A run of one step a call, unless `changes` say otherwise, so that it can be stopped at any."""
  config = tiny.get_config(data, **{"steps_per_call": 1, **changes})
  return train.train_and_evaluate(config, workdir)


def lines(workdir):
  """The records of metrics.jsonl without times and commit: numbers that a repetition has too."""
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [
    {k: v for k, v in r.items() if k not in ("seconds", "images_per_second", "commit")}
    for r in records
  ]


def load_checkpoint(workdir, step):
  """The training state as nested dictionaries, read by Orbax alone."""
  import orbax.checkpoint as ocp

  path = (workdir / "checkpoints" / str(step) / "state").absolute()
  checkpointer = ocp.StandardCheckpointer()
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  leaves = checkpointer.metadata(path).item_metadata.tree  # several processes may have written it
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), leaves)
  return checkpointer.restore(path, target)


def flat_checkpoint(workdir, step):
  """{"params/unit/conv/kernel": array, ...}; the random key as its data."""
  leaves = jax.tree_util.tree_leaves_with_path(load_checkpoint(workdir, step))
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(
      jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    )
    for path, leaf in leaves
  }


def result_of(workdir):
  """result.json without times, and without the config, in which some keys may differ."""
  result = json.loads((workdir / "result.json").read_text())
  timed = ("train_seconds", "images_per_second", "date", "commit", "command", "config")
  return {name: value for name, value in result.items() if name not in timed}


def assert_same_run(one, other):
  """All outputs of two finished runs are equal bit for bit, except times."""
  assert lines(one) == lines(other)
  assert result_of(one) == result_of(other)
  states = [flat_checkpoint(path, LAST_STEP) for path in (one, other)]
  assert states[0].keys() == states[1].keys()
  for name, leaf in states[0].items():
    np.testing.assert_array_equal(leaf, states[1][name], err_msg=name)


def checkpoint_steps(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def interrupt_at(monkeypatch, step):
  """Sends SIGINT before the chunk that contains `step`."""
  for feed in (host_feed.HostFeed, device_feed.DeviceFeed):
    original = feed.chunks

    def chunks(self, steps, original=original):
      for length, inputs in original(self, steps):
        if step in steps[:length]:
          signal.raise_signal(signal.SIGINT)
        steps = steps[length:]
        yield length, inputs

    monkeypatch.setattr(feed, "chunks", chunks)
