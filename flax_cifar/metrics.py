"""The loss, its sums and counts under a mask, the record of an epoch, and statistics of runs.

Metrics are summed first and divided once, so every example counts once.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

Metrics = dict[str, Array]  # the sums of one or several steps, on the device
Totals = dict[str, np.ndarray]  # their sums on the host: float64, () or (seeds,)
Record = dict[str, Any]  # an epoch, as a line of metrics.jsonl has it


# ---- Loss


def create_targets(
  labels: Int[Array | np.ndarray, " n"], num_classes: int, *, label_smoothing: float
) -> Float[Array, "n {num_classes}"]:
  """Distributions float32 (N, classes) for labels int32 (N,).

  Source: Szegedy et al. 2016, arXiv:1512.00567.

  Args:
    labels: int32 (N,).
    num_classes: number of classes.
    label_smoothing: probability mass spread evenly over all classes, in [0, 1).
  """
  return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), label_smoothing)


def cross_entropy(
  logits: Float[Array, "*seeds n classes"], targets: Float[Array, "n classes"]
) -> Float[Array, "*seeds n"]:
  """Cross-entropy of each example in nats.

  Args:
    logits: float32 (..., N, classes).
    targets: float32 (N, classes), each a distribution.

  Returns:
    float32 (..., N).
  """
  return -(targets * jax.nn.log_softmax(logits)).sum(-1)


def distill(
  losses: Float[Array, " n"],
  logits: Float[Array, "n classes"],
  taught: Float[Array, "n classes"],
  *,
  weight: float,
  temperature: float,
) -> Float[Array, " n"]:
  """The losses of a student that learns from a teacher too, in nats.

  The teacher's part is the Kullback-Leibler divergence of the student's distribution from the
  teacher's, both at `temperature`, times its square: then its gradient does not depend on it much.
  Source: Hinton et al. 2015, arXiv:1503.02531.

  Args:
    losses: float32 (N,), against the labels.
    logits: float32 (N, classes), of the student.
    taught: float32 (N, classes), of the teacher.
    weight: of the teacher's part, in [0, 1].
    temperature: that divides the logits.
  """
  expected = jax.nn.log_softmax(taught / temperature)
  divergence = (jnp.exp(expected) * (expected - jax.nn.log_softmax(logits / temperature))).sum(-1)
  return (1 - weight) * losses + weight * temperature**2 * divergence


# ---- Sums and counts


def create_totals(num_seeds: int) -> Totals:
  """Zero nats, examples, examples, and seconds of training (0 in evaluation)."""
  shape = () if num_seeds == 1 else (num_seeds,)
  names = ("loss_sum", "correct", "count")
  return {name: np.zeros(shape) for name in names} | {"seconds": np.zeros(())}


def compute_totals(
  losses: Float[Array, "*seeds n"],
  logits: Float[Array, "*seeds n classes"],
  labels: Int[Array | np.ndarray, " n"],
  mask: Float[Array, " n"],
) -> Metrics:
  """Sums over the examples whose mask is 1.

  Args:
    losses: float32 (..., N), nats.
    logits: float32 (..., N, classes).
    labels: int32 (N,).
    mask: float32 (N,) of 0 and 1.

  Returns:
    `loss_sum` (...), `correct` (...), `count` ().
  """
  return {
    "loss_sum": jnp.sum(losses * mask, -1),
    "correct": jnp.sum((logits.argmax(-1) == labels) * mask, -1),
    "count": jnp.sum(mask),
  }


def add_totals(a: Totals, b: Mapping[str, Any]) -> Totals:
  """`a` with the entries of `b` added, on the host in float64."""
  return {**a, **{name: np.asarray(a[name] + np.float64(b[name])) for name in b}}


def iterate_steps(chunks: Sequence[Metrics]) -> Iterator[dict[str, np.ndarray]]:
  """Fetches the metrics of some chunks, arrays (steps, ...), and yields them step by step."""
  for chunk in jax.device_get(chunks):
    for step in range(len(chunk["count"])):
      yield {name: values[step] for name, values in chunk.items()}


def compute_means(totals: Totals) -> dict[str, np.ndarray]:
  """Mean `loss` in nats and `accuracy` in [0, 1], () or (seeds,)."""
  return {
    "loss": np.asarray(totals["loss_sum"] / totals["count"]),
    "accuracy": np.asarray(totals["correct"] / totals["count"]),
  }


# ---- Records


def create_record(
  *,
  epoch: int,
  step: int,
  total_epochs: int,
  learning_rate: np.ndarray | float,
  train: Totals,
  validation: Mapping[str, np.ndarray | float] | None,
  commit: str,
) -> Record:
  """The record of an epoch; values with an axis for the seeds as `describe_seeds` gives them.

  Args:
    epoch: counted from 1.
    step: steps done.
    total_epochs: of the run, on which the learning rate may depend.
    learning_rate: of the epoch's last step, () or (seeds,).
    train: totals of the epoch.
    validation: `loss` and `accuracy`, () or (seeds,); None without a validation split.
    commit: of the code that trained it.
  """
  values = {
    "learning_rate": learning_rate,
    **{f"train_{name}": value for name, value in compute_means(train).items()},
    **{f"validation_{name}": value for name, value in (validation or {}).items()},
    "seconds": train["seconds"],
    "images_per_second": train["count"].sum() / train["seconds"],
  }
  record: Record = {"epoch": epoch, "step": step, "total_epochs": total_epochs}
  for name, value in values.items():
    record |= describe_seeds(name, value)
  return record | {"commit": commit}


def list_earlier(records: Sequence[Mapping[str, Any]], name: str, now: Any) -> list[Any]:
  """The other values than `now` of a field, in their order; older runs may lack it.

  The `total_epochs` of a run change when it is extended, and its `commit` when it is resumed.

  >>> list_earlier([{"epoch": 1}, {"commit": "a"}, {"commit": "b"}], "commit", "b")
  ['a']
  """
  values = (record.get(name, now) for record in records)
  return [value for value in dict.fromkeys(values) if value != now]


def describe_seeds(name: str, values: Any) -> dict[str, Any]:
  """The fields of a record for `values`, () or (seeds,): their mean, and of several a list."""
  fields: dict[str, Any] = {name: float(np.mean(values))}
  if np.ndim(values):
    fields[f"{name}_per_seed"] = np.asarray(values).tolist()
  return fields


def get_per_seed(record: Mapping[str, Any], name: str) -> list[float]:
  """The values of a record for each seed that was trained at once; mostly one.

  A loss that was not finite, null in JSON, is NaN.
  """
  values = record.get(f"{name}_per_seed", [record[name]])
  return [math.nan if value is None else value for value in values]


def describe_sample(values: Sequence[float]) -> dict[str, Any] | None:
  """Mean, sample standard deviation and number of `values`; None of no values.

  The standard deviation of a single value is None.
  """
  if not values:
    return None
  sd = statistics.stdev(values) if len(values) > 1 else None
  return {"mean": statistics.fmean(values), "sd": sd, "n": len(values)}


def describe_difference(differences: Sequence[float]) -> dict[str, Any]:
  """`describe_sample` of paired differences, and the 95 % `interval` of their mean.

  The interval is by Student's t; None for a single pair.
  """
  sample = describe_sample(differences)
  if sample is None or sample["sd"] is None:
    return {**(sample or {}), "interval": None}
  from scipy import stats

  half = stats.t.ppf(0.975, sample["n"] - 1) * sample["sd"] / sample["n"] ** 0.5
  return {**sample, "interval": (sample["mean"] - half, sample["mean"] + half)}


class CalibrationBins(NamedTuple):
  """Examples by their confidence, the largest probability, in bins of equal width.

  Attributes:
    examples: their number in each bin.
    confidence: their mean confidence, in [0, 1]; 0 in an empty bin.
    accuracy: the share of them that is right, in [0, 1]; 0 in an empty bin.
  """

  examples: np.ndarray
  confidence: np.ndarray
  accuracy: np.ndarray

  @property
  def error(self) -> float:
    """The expected calibration error in [0, 1]: how far confidence is from accuracy.

    It is the mean distance of a bin's accuracy from its confidence, weighted by its examples.
    Source: Guo et al. 2017, arXiv:1706.04599.
    """
    return float(np.abs(self.confidence - self.accuracy) @ self.examples / self.examples.sum())


def compute_calibration(
  logits: np.ndarray, labels: np.ndarray, *, bins: int = 15
) -> CalibrationBins:
  """Puts examples into `bins` bins by their confidence.

  Args:
    logits: (N, classes).
    labels: integers (N,).
    bins: their number.
  """
  logits = logits.astype(np.float64)
  shares = np.exp(logits - logits.max(-1, keepdims=True))
  confidence = (shares / shares.sum(-1, keepdims=True)).max(-1)
  numbers = np.minimum((confidence * bins).astype(int), bins - 1)
  count = np.bincount(numbers, minlength=bins)
  divisor = np.maximum(count, 1)
  right = np.bincount(numbers, logits.argmax(-1) == labels, bins)
  return CalibrationBins(count, np.bincount(numbers, confidence, bins) / divisor, right / divisor)


def get_median_rate(records: Sequence[Record]) -> float:
  """Median of the epochs' training images per second."""
  return float(np.median([record["images_per_second"] for record in records]))
