"""What a run says of itself: the banner, result.json and the last lines on the screen."""

import datetime
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from flax_cifar.data.dataset import Split
from flax_cifar.data.splits import PROTOCOLS, Splits
from flax_cifar.environment import get_command, get_commit, get_versions
from flax_cifar.losses import create_targets, cross_entropy
from flax_cifar.metrics import add_totals, compute_means, compute_totals, create_totals
from flax_cifar.models.lowering import choose_way, describe_way
from flax_cifar.run_log import Record, RunLog, median_rate
from flax_cifar.seeds import describe_seeds
from flax_cifar.settings import describe_settings


def describe_run(
  config: ConfigDict, splits: Splits, parameters: int, hardware: str, workdir: pathlib.Path
) -> dict[str, str]:
  """The banner: what runs, on what."""
  sizes = (
    f"{len(split):,} {name}"
    for name, split in (
      ("train", splits.train),
      ("validation", splits.validation),
      ("test", splits.test),
    )
  )
  rate = f"learning rate {config.optimizer.learning_rate:g} ({config.schedule.name})"
  last = config.seed + config.num_seeds - 1
  seeds = f"seed {last}" if config.num_seeds == 1 else f"seeds {config.seed} to {last}"
  ops = ", ".join(config.augment.ops) or "none"
  return {
    "config": f"{config.name}, {seeds}",
    "protocol": f"{config.protocol}: {PROTOCOLS[config.protocol]}",
    "network": f"{config.model.name}, {config.model.norm} norm, {parameters:,} parameters",
    "training": f"{config.total_epochs} epochs, batch {config.batch_size}, "
    f"{config.optimizer.name}, {rate}",
    "augment": f"{ops} ({config.augment.backend}), mixing {config.mixing.name}",
    "data": f"{config.data.name}: {', '.join(sizes)} images",
    "device": hardware,
    "kernels": describe_way(),
    "settings": describe_settings(os.environ),
    "workdir": str(workdir),
  }


def score(judge: str, split: Split, logits: np.ndarray) -> dict[str, Any]:
  """Accuracy in [0, 1] and loss in nats of logits (N, classes) on `split`, which is called `judge`.

  Of logits (seeds, N, classes): the mean, the sample standard deviation `..._sd`, and a list.
  """
  labels, outputs = jnp.asarray(split.labels), jnp.asarray(logits)
  targets = create_targets(labels, logits.shape[-1], label_smoothing=0.0)
  totals = compute_totals(cross_entropy(outputs, targets), outputs, labels, jnp.ones(len(split)))
  fields: dict[str, Any] = {}
  for name, values in compute_means(add_totals(create_totals(1), totals)).items():
    fields |= describe_seeds(f"{judge}_{name}", values)
    if values.ndim:
      fields[f"{judge}_{name}_sd"] = float(np.std(values, ddof=1))
  return fields


def summarise(config: ConfigDict, records: list[Record]) -> dict[str, Any]:
  """What else result.json holds: the protocol, the training, and what it takes to repeat it."""
  validated = [record for record in records if "validation_accuracy" in record]
  best = max(validated, key=lambda record: record["validation_accuracy"], default=None)
  return {
    "protocol": config.protocol,
    "scored_weights": "moving average, last epoch" if config.ema.decay else "last epoch",
    "best_validation": best and {"epoch": best["epoch"], "accuracy": best["validation_accuracy"]},
    "epochs": records[-1]["epoch"],
    "train_seconds": sum(record["seconds"] for record in records),
    "images_per_second": median_rate(records),
    "seed": config.seed,
    "num_seeds": config.num_seeds,
    "kernels": choose_way(),
    "config": json.loads(config.to_json()),
    "versions": get_versions(),
    "command": get_command(),
    "commit": get_commit(),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }


def say_result(log: RunLog, result: dict[str, Any], workdir: pathlib.Path) -> None:
  """Shows the final and the best validation accuracy, and what the run has written."""
  accuracy, loss = format_score(result, "accuracy", ".2%"), format_score(result, "loss", ".4f")
  log.say(f"{get_judge(result)} accuracy {accuracy}, loss {loss}")
  if result["best_validation"]:
    best = result["best_validation"]
    peeked = " (on the test split)" if result["protocol"] == "published" else ""
    log.say(f"best validation accuracy {best['accuracy']:.2%}{peeked}, epoch {best['epoch']}")
  log.say(f"result    {workdir / 'result.json'}")
  log.say(f"weights   {workdir / 'weights.safetensors'}")
  for picture in sorted(workdir.glob("*.png")):
    log.say(f"picture   {picture}")


def get_judge(result: Mapping[str, Any]) -> str:
  """The split that the run was scored on at its end: "test", or "validation" of a trial."""
  return "test" if "test_accuracy" in result else "validation"


def format_score(result: dict[str, Any], metric: str, spec: str) -> str:
  """The final `metric` in the format `spec`; of several seeds as `mean ± sd (n=k)`."""
  name = f"{get_judge(result)}_{metric}"
  text = format(result[name], spec)
  if result["num_seeds"] > 1:
    text += f" ± {format(result[f'{name}_sd'], spec)} (n={result['num_seeds']})"
  return text
