"""The start-up banner, result.json and the closing summary."""

import datetime
import json
import os
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flax_cifar import environment, errors, files, metrics, zoo
from flax_cifar import state as state_lib
from flax_cifar.data import dataset, feeds
from flax_cifar.data import splits as splits_lib
from flax_cifar.kernels import backend
from flax_cifar.parallel import agreement
from flax_cifar.parallel import seeds as seeds_lib
from flax_cifar.run import config as config_lib
from flax_cifar.run import log as log_lib
from flax_cifar.run import plots, tables, teacher, weights
from flax_cifar.run import workdir as workdir_lib

PICTURES = ("augmented.png", "curves.png", "learning_rate.png", "misclassified.png")
# A slash that starts a path: not that of a/b, ./a, ../a or https://a.
ABSOLUTE_PATH = re.compile(r"(?<![\w./-])/[\w.]|\b[A-Za-z]:\\")
LOCAL_KEYS = ("data.dir", "augment.workers")  # may differ from process to process


def get_facts(params: Any, num_seeds: int, mesh: Mesh) -> dict[str, Any]:
  """The number of `parameters` of one seed, `hardware`, `versions` and `commit`.

  They are found at the start, because a checkout may change while a run trains.
  """
  return {
    "parameters": state_lib.count_parameters(params) // num_seeds,
    "hardware": environment.get_hardware(mesh.size),
    "versions": environment.get_versions(),
    "commit": agreement.by_first(environment.get_commit)(),
  }


def list_shared(config: ConfigDict, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
  """The values that must be equal in all processes of a run.

  Args:
    config: of the run.
    fingerprint: of the data, see `splits.Splits.fingerprint`.
  """
  flat = config_lib.without(config_lib.flatten(config.to_dict()), LOCAL_KEYS)
  return {**flat, **fingerprint, **environment.get_versions()}


def describe_run(
  config: ConfigDict,
  splits: splits_lib.Splits,
  facts: Mapping[str, Any],
  workdir: pathlib.Path,
) -> dict[str, str]:
  """The banner: what runs, on what."""
  parts = {"training": splits.train, "validation": splits.validation, "test": splits.test}
  sizes = (f"{len(split):,} {name}" for name, split in parts.items())
  rate = f"learning rate {config.optimizer.learning_rate:g} ({config.schedule.name})"
  last = config.seed + config.num_seeds - 1
  seeds = f"seed {last}" if config.num_seeds == 1 else f"seeds {config.seed} to {last}"
  ops = ", ".join(config.augment.ops) or "none"
  banner = {
    "config": f"{config.name}, {seeds}",
    "protocol": f"{config.protocol}: {splits_lib.PROTOCOLS[config.protocol]}",
    "network": f"{config.model.name}, {config.model.norm} norm, {facts['parameters']:,} parameters"
    f", computed in {config.compute_dtype}",
    "training": f"{config.total_epochs} epochs, batch {config.batch_size}, "
    f"{config.optimizer.name}, {rate}",
    "augment": f"{ops} ({config.augment.backend}), mixing {config.mixing.name}",
    "data": f"{config.data.name}: {', '.join(sizes)} images",
    "device": facts["hardware"],
    "kernels": backend.describe_backend(),
    "settings": environment.describe_settings(os.environ),
    "workdir": str(workdir),
  }
  return {name: text for name, text in banner.items() if text}


@agreement.by_first
def finish_run(
  workdir: pathlib.Path,
  *,
  config: ConfigDict,
  splits: splits_lib.Splits,
  feed: feeds.Feed,
  records: Sequence[metrics.Record],
  variables: Mapping[str, Any],
  logits: np.ndarray,
  mean: Sequence[float],
  std: Sequence[float],
  facts: Mapping[str, Any],
  log: log_lib.RunLog,
) -> dict[str, Any]:
  """Writes the weights, the plots and, last, result.json; prints the result and returns it.

  Args:
    workdir: of the run.
    config: of the run.
    splits: whose final split was scored.
    feed: whose first batch is drawn.
    records: of all epochs.
    variables: of the first seed.
    logits: float32 (N, classes) of the final split, or (seeds, N, classes).
    mean: that normalization subtracts, per channel in [0, 1].
    std: that normalization divides by.
    facts: further entries of result.json, see `get_facts`.
    log: prints the result.
  """
  weights.save_weights(
    workdir / zoo.WEIGHTS,
    variables,
    config=config.to_dict(),
    class_names=splits.class_names,
    image_shape=splits.image_shape,
    mean=mean,
    std=std,
    data=splits.fingerprint,
  )
  scores = score(splits.final_split_name, splits.final_split, logits)
  result = {
    **scores,
    **summarize(config, records),
    **facts,
    "earlier_total_epochs": metrics.list_earlier(records, "total_epochs", config.total_epochs),
    "earlier_commits": metrics.list_earlier(records, "commit", facts["commit"]),
    "data": splits.fingerprint,
  }
  if config.log.pictures:
    first = seeds_lib.select(logits, config.num_seeds)
    augmented, curves, rate, misclassified = (workdir / name for name in PICTURES)
    plots.save_first_batch(augmented, feed, splits.class_names)
    plots.save_misclassified(misclassified, splits.final_split, first, splits.class_names)
    plots.save_curves(curves, records)
    plots.save_learning_rate(rate, records, config.to_dict())
    drawn = [workdir / name for name in PICTURES if (workdir / name).exists()]
    log.write_pictures(drawn, records[-1]["step"])
  files.write_json(workdir / "result.json", result)  # last: it says that the run is finished
  report_result(log, result, workdir)
  return result


def score(name: str, split: dataset.Split, logits: np.ndarray) -> dict[str, Any]:
  """Accuracy in [0, 1] and loss in nats of `logits` on `split`, in fields that start with `name`.

  Args:
    name: of the split.
    split: N images.
    logits: float32 (N, classes); of (seeds, N, classes) the fields are the mean, the sample
      standard deviation `..._sd`, and the list `..._per_seed`.
  """
  labels, outputs = jnp.asarray(split.labels), jnp.asarray(logits)
  targets = metrics.create_targets(labels, logits.shape[-1], label_smoothing=0.0)
  losses = metrics.cross_entropy(outputs, targets)
  sums = metrics.compute_totals(losses, outputs, labels, jnp.ones(len(split)))
  means = metrics.compute_means(metrics.add_totals(metrics.create_totals(1), sums))
  fields: dict[str, Any] = {}
  for metric, values in means.items():
    fields |= metrics.describe_seeds(f"{name}_{metric}", values)
    if values.ndim:
      fields[f"{name}_{metric}_sd"] = float(np.std(values, ddof=1))
  return fields


def summarize(config: ConfigDict, records: Sequence[metrics.Record]) -> dict[str, Any]:
  """The entries of result.json beside the scores: protocol, training, and how to repeat it."""
  validated = [record for record in records if "validation_accuracy" in record]
  best = max(validated, key=lambda record: record["validation_accuracy"], default=None)
  return {
    "protocol": config.protocol,
    "scored_weights": "moving average, last epoch" if config.ema.decay else "last epoch",
    "best_validation": best and {"epoch": best["epoch"], "accuracy": best["validation_accuracy"]},
    "epochs": records[-1]["epoch"],
    "train_seconds": sum(record["seconds"] for record in records),
    "images_per_second": metrics.get_median_rate(records),
    "seed": config.seed,
    "num_seeds": config.num_seeds,
    "kernels": backend.select_backend(),
    "config": json.loads(config.to_json()),
    "command": environment.get_command(),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }


def list_commits(result: Mapping[str, Any]) -> list[str]:
  """The commits whose code trained a run, in their order; older results know the last one alone."""
  return [*result.get("earlier_commits", []), result["commit"]]


def report_result(log: log_lib.RunLog, result: dict[str, Any], workdir: pathlib.Path) -> None:
  """Prints the final and the best validation accuracy, and the files that the run has written."""
  accuracy, loss = format_score(result, "accuracy", ".2%"), format_score(result, "loss", ".4f")
  log.print(f"{get_final_split_name(result)} accuracy {accuracy}, loss {loss}")
  if result["best_validation"]:
    best = result["best_validation"]
    peeked = tables.PEEKED if result["protocol"] == "published" else ""
    mean = " of the seeds' mean" if result["num_seeds"] > 1 else ""
    log.print(
      f"best validation accuracy {best['accuracy']:.2%}{peeked}, epoch {best['epoch']}{mean}"
    )
  log.print(f"result    {workdir / 'result.json'}")
  log.print(f"weights   {workdir / zoo.WEIGHTS}")
  for picture in sorted(workdir.glob("*.png")):
    log.print(f"picture   {picture}")


def get_final_split_name(result: Mapping[str, Any]) -> str:
  """The split that the run was scored on at its end: "test", or "validation" of a trial."""
  return "test" if "test_accuracy" in result else "validation"


def format_score(result: Mapping[str, Any], metric: str, spec: str) -> str:
  """The final `metric` in the format `spec`; of several seeds as mean ± sd (n = k)."""
  name = f"{get_final_split_name(result)}_{metric}"
  if result[name] is None:
    return "not finite"
  if result["num_seeds"] == 1:
    return format(result[name], spec)
  sample = {"mean": result[name], "sd": result[f"{name}_sd"], "n": result["num_seeds"]}
  return tables.format_sample(sample, spec)


def drop_workdir(command: str) -> str:
  """The command of a run without --workdir, which tells where and not what.

  >>> drop_workdir("python main.py --workdir=/home/me/run --config=s9 --workdir /tmp")
  'python main.py --config=s9'
  """
  kept, words = [], iter(shlex.split(command))
  for word in words:
    if word in ("--workdir", "-workdir"):
      next(words, None)
    elif not word.startswith(("--workdir=", "-workdir=")):
      kept.append(word)
  return shlex.join(kept)


def list_paths(content: Any, key: str = "") -> list[tuple[str, str]]:
  """The texts in nested dictionaries and lists that show an absolute path, as (dotted key, text).

  >>> list_paths({"seed": 0, "data": {"name": "npz:/home/me/a.npz", "dir": "data"}})
  [('data.name', 'npz:/home/me/a.npz')]
  """
  if isinstance(content, str):
    return [(key, content)] if ABSOLUTE_PATH.search(content) else []
  if not isinstance(content, Mapping | list | tuple):
    return []
  items = content.items() if isinstance(content, Mapping) else enumerate(content)
  return [found for name, one in items for found in list_paths(one, f"{key}.{name}".lstrip("."))]


@agreement.by_first
def find_finished(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any] | None:
  """Prints and returns the result if the run in `workdir` has finished; otherwise returns None.

  Writes nothing.

  Raises:
    UserError: no run of `config` can go on there, or it has finished and its data have changed.
  """
  workdir_lib.check_config(workdir, config.to_dict())
  if finished := _report_finished(config, workdir):
    return finished
  workdir_lib.check_writable(workdir)
  return None


def _report_finished(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any] | None:
  result = workdir_lib.read_result(workdir)
  if result is None or result["epochs"] < config.total_epochs:
    return None
  expected = f"{result['epochs']} or more, as the run has finished that many; or choose another"
  is_whole = result["epochs"] == config.total_epochs
  errors.require(is_whole, "total_epochs", config.total_epochs, f"{expected} --workdir")
  try:
    splits = splits_lib.load_splits(protocol=config.protocol, **config.data)
    fingerprint = splits.fingerprint | teacher.get_fingerprint(config)
  except errors.UserError as error:  # the result does not need the data
    errors.warn(f"the data of the run cannot be compared with those of now: {error}")
  else:
    workdir_lib.check_data(workdir, fingerprint)
  if config.log.screen:
    print(format_finished(result, workdir))
  return result


def format_finished(result: Mapping[str, Any], workdir: pathlib.Path) -> str:
  """The line for a run that is finished already."""
  accuracy = format_score(result, "accuracy", ".2%")
  return f"{workdir} is finished: {get_final_split_name(result)} accuracy {accuracy}"
