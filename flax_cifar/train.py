"""The run, from top to bottom: `train_and_evaluate`, with `train_step` beside it."""

import contextlib
import datetime
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from ml_collections import ConfigDict

from flax_cifar import pictures
from flax_cifar.checkpoint import Checkpoints
from flax_cifar.data.augment_host import OPS, create_host_augment
from flax_cifar.data.dataset import Split
from flax_cifar.data.pipeline import Normalize, TrainBatches, create_normalize, iterate
from flax_cifar.data.splits import PROTOCOLS, Splits, load_splits
from flax_cifar.environment import get_commit, get_hardware, get_versions
from flax_cifar.errors import UserError, choose, require
from flax_cifar.evaluate import create_eval_step, evaluate, predict
from flax_cifar.interrupt import Interrupted, InterruptGuard
from flax_cifar.layer_table import format_layer_table, get_layer_table
from flax_cifar.losses import cross_entropy
from flax_cifar.metrics import NO_TOTALS, Totals, add_totals, compute_means, compute_totals
from flax_cifar.models import create_model
from flax_cifar.optimizers import create_optimizer
from flax_cifar.partition import check_batch_size, create_mesh, replicated, split_batch
from flax_cifar.run_log import Record, Report, RunLog, median_rate
from flax_cifar.schedules import create_plateau, create_schedule
from flax_cifar.state import TrainState, create_train_state, update_ema
from flax_cifar.workdir import check_workdir, read_result, write_json

AUGMENT_BACKENDS = {"albumentations": create_host_augment}

Batch = dict[str, Any]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  normalize: Normalize,
  label_smoothing: float,
  ema_decay: float,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One step of gradient descent; pure.

  Args:
    state: the state before it.
    batch: image uint8 (N, H, W, C) and label int32 (N,).
    model: the network.
    optimizer: what `state.opt_state` belongs to.
    normalize: uint8 images -> float32 images.
    label_smoothing: see `cross_entropy`.
    ema_decay: see `update_ema`; 0 switches the average off.

  Returns:
    The state after it and the totals of the batch, see `compute_totals`.
  """
  images, labels = normalize(batch["image"]), batch["label"]
  dropout_key = jax.random.fold_in(state.key, state.step)

  def loss_fn(params: Any) -> Any:
    logits, updates = model.apply(
      {"params": params, "batch_stats": state.batch_stats},
      images,
      train=True,
      rngs={"dropout": dropout_key},
      mutable=["batch_stats"],
    )
    losses = cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return losses.mean(), (losses, logits, updates.get("batch_stats", {}))

  gradients, (losses, logits, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
  updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
  updates = jax.tree.map(lambda update: update * state.plateau.scale, updates)
  params = optax.apply_updates(state.params, updates)
  ema = state.ema
  if ema_decay:
    new = {"params": params, "batch_stats": batch_stats}
    ema = update_ema(ema, new, state.step, ema_decay)
  state = state.replace(
    step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema
  )
  return state, compute_totals(losses, logits, labels, jnp.ones(len(labels)))


def train_epoch(
  step_fn: TrainStep,
  state: TrainState,
  totals: Totals,
  stream: Iterator[Batch],
  steps: range,
  *,
  guard: InterruptGuard,
  report: Report,
) -> tuple[TrainState, Totals, int]:
  """Trains for `steps`, or until `guard` has caught a signal.

  Each step's metrics are read while the next one runs, so the device never waits for the host.

  Returns:
    The state, `totals` with the sums of these steps added, and the steps of the run now done.

  Raises:
    UserError: the loss is not finite.
  """
  started = time.perf_counter()
  pending: list[tuple[int, dict[str, jax.Array]]] = []
  for step in steps:
    state, metrics = step_fn(state, next(stream))
    pending.append((step + 1, metrics))
    if guard.signum:
      break
    if len(pending) > 1:
      totals = _collect(totals, *pending.pop(0), report)
  for done, metrics in pending:
    totals = _collect(totals, done, metrics, report)
  totals = add_totals(totals, {"seconds": time.perf_counter() - started})
  return state, totals, done


def _collect(totals: Totals, done: int, metrics: dict[str, jax.Array], report: Report) -> Totals:
  totals = add_totals(totals, metrics)
  if not math.isfinite(totals["loss_sum"]):
    raise UserError(
      f"the loss became {float(metrics['loss_sum'])} at step {done:,}; the last checkpoint is "
      "kept. Lower optimizer.learning_rate, or warm up with schedule.name=cosine or one_cycle."
    )
  report(totals)
  return totals


def train_and_evaluate(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains, validates, tests and reports the run that `config` describes.

  The same call again goes on from the latest checkpoint; for a finished run it does nothing.

  Returns:
    What result.json holds.

  Raises:
    UserError: something the user can mend; nothing was overwritten.
    Interrupted: a signal came; the state was saved.
  """
  check_workdir(workdir, config.to_dict())
  result = read_result(workdir)
  if result and result["epochs"] >= config.total_epochs:
    print(f"{workdir} is finished: test accuracy {result['test_accuracy']:.2%}")
    return result

  #### Data
  splits = load_splits(protocol=config.protocol, **config.data)
  mean, std = config.augment.mean or splits.mean, config.augment.std or splits.std
  normalize = create_normalize(mean, std)
  create_augment = choose("augment.backend", config.augment.backend, AUGMENT_BACKENDS)
  augment = create_augment(
    ops=config.augment.ops, mean=mean, **{name: config.augment[name] for name in OPS}
  )
  batches = TrainBatches(
    splits.train,
    batch_size=config.batch_size,
    total_epochs=config.total_epochs,
    seed=config.seed,
    augment=augment,
  )
  steps_per_epoch = batches.steps_per_epoch

  #### Network, schedule, optimiser, state
  model = create_model(
    **config.model,
    num_classes=len(splits.class_names),
    norm_arguments=config.norm,
    dtype=config.compute_dtype,
  )
  schedule = create_schedule(
    steps_per_epoch=steps_per_epoch, total_epochs=config.total_epochs, **config.schedule
  )
  plateau = create_plateau(**config.schedule.plateau)
  on_plateau = config.schedule.name == "plateau"
  optimizer = create_optimizer(schedule, **config.optimizer)
  state = create_train_state(
    model=model,
    optimizer=optimizer,
    plateau=plateau,
    image_shape=splits.image_shape,
    ema_decay=config.ema.decay,
    seed=config.seed,
  )
  _check_durations(config, has_validation=len(splits.validation) > 0)

  #### Compiled steps
  mesh = create_mesh(config.num_devices)
  check_batch_size("batch_size", config.batch_size, mesh)
  check_batch_size("eval_batch_size", config.eval_batch_size, mesh)
  step_fn = jax.jit(
    functools.partial(
      train_step,
      model=model,
      optimizer=optimizer,
      normalize=normalize,
      label_smoothing=config.loss.label_smoothing,
      ema_decay=config.ema.decay,
    ),
    in_shardings=(replicated(mesh), split_batch(mesh)),
    out_shardings=replicated(mesh),
    donate_argnums=0,
  )
  first_batch = batches[0]
  step_fn.eval_shape(state, first_batch)  # what does not fit together fails here, early
  eval_step = create_eval_step(model=model, normalize=normalize, mesh=mesh)
  observe = jax.jit(lambda plateau_state, loss: plateau.update({}, plateau_state, value=loss)[1])

  #### Start or resume
  workdir.mkdir(parents=True, exist_ok=True)
  write_json(workdir / "config.json", config.to_dict())
  checkpoints = Checkpoints(workdir / "checkpoints")
  state, totals = checkpoints.restore_or(state, NO_TOTALS, mesh)
  done = int(state.step)
  table = format_layer_table(get_layer_table(model, splits.image_shape))
  (workdir / "summary.txt").write_text(table)
  log = RunLog(
    workdir, step=done, total_epochs=config.total_epochs, tensorboard=config.log.tensorboard
  )
  parameters = int(parameter_overview.count_parameters(state.params))
  hardware = get_hardware(mesh.size)
  log.banner(_describe_run(config, splits, parameters, hardware, workdir))
  if done:
    log.say(f"resumed at step {done:,}, epoch {done / steps_per_epoch:.2f}")
  if config.log.pictures:
    pictures.save_augmented(workdir / "augmented.png", first_batch, splits.class_names)

  try:
    #### Epochs
    stream = iterate(batches, start_step=done, workers=config.augment.workers)
    with InterruptGuard() as guard, contextlib.closing(stream):
      for epoch in range(done // steps_per_epoch, config.total_epochs):
        start, end = epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch
        with log.progress(epoch + 1, done=done - start, total=steps_per_epoch) as report:
          state, totals, done = train_epoch(
            step_fn, state, totals, stream, range(done, end), guard=guard, report=report
          )
        validation = None
        if done == end:
          rate = config.optimizer.learning_rate * float(schedule(end - 1) * state.plateau.scale)
          if len(splits.validation):
            validation = evaluate(
              eval_step, state.eval_variables, splits.validation, config.eval_batch_size
            )
          if on_plateau and validation:
            state = state.replace(plateau=observe(state.plateau, validation["loss"]))
          log.write(
            epoch=epoch + 1, step=end, learning_rate=rate, train=totals, validation=validation
          )
          totals = NO_TOTALS
        signum = guard.signum  # read once: a signal after the save must wait for the next one
        last = done == len(batches)
        if signum or last or (done == end and (epoch + 1) % config.checkpoint.every == 0):
          checkpoints.save(done, state, totals, validation)
        if signum:
          raise Interrupted(signum, done)

    #### Test, once
    logits = predict(eval_step, state.eval_variables, splits.test, config.eval_batch_size)
    result = {
      **_score(splits.test, logits),
      **_summarise(config, log.records),
      "parameters": parameters,
      "hardware": hardware,
    }
    write_json(workdir / "result.json", result)
    if config.log.pictures:
      pictures.save_misclassified(
        workdir / "misclassified.png", splits.test, logits, splits.class_names
      )
      pictures.save_curves(workdir / "curves.png", log.records)
      pictures.save_learning_rate(workdir / "learning_rate.png", log.records)
    _say_result(log, result, workdir)
  finally:
    checkpoints.close()
    log.close()
  return result


def _check_durations(config: ConfigDict, *, has_validation: bool) -> None:
  require(config.total_epochs > 0, "total_epochs", config.total_epochs, "1 or more")
  require(config.checkpoint.every > 0, "checkpoint.every", config.checkpoint.every, "1 or more")
  require(0 <= config.ema.decay < 1, "ema.decay", config.ema.decay, "at least 0 and below 1")
  require(
    has_validation or config.schedule.name != "plateau",
    "data.validation_size",
    config.data.validation_size,
    "positive where schedule.name='plateau'",
  )


def _describe_run(
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
  return {
    "config": f"{config.name}, seed {config.seed}",
    "protocol": f"{config.protocol}: {PROTOCOLS[config.protocol]}",
    "network": f"{config.model.name}, {config.model.norm} norm, {parameters:,} parameters",
    "training": f"{config.total_epochs} epochs, batch {config.batch_size}, "
    f"{config.optimizer.name}, {rate}",
    "augment": ", ".join(config.augment.ops) or "none",
    "data": f"{config.data.name}: {', '.join(sizes)} images",
    "device": hardware,
    "workdir": str(workdir),
  }


def _score(test: Split, logits: np.ndarray) -> dict[str, float]:
  """Accuracy in [0, 1] and loss in nats of logits (N, classes) on the test split."""
  labels, outputs = jnp.asarray(test.labels), jnp.asarray(logits)
  losses = cross_entropy(outputs, labels, label_smoothing=0.0)
  totals = compute_totals(losses, outputs, labels, jnp.ones(len(test)))
  means = compute_means(add_totals(NO_TOTALS, totals))
  return {f"test_{name}": value for name, value in means.items()}


def _summarise(config: ConfigDict, records: list[Record]) -> dict[str, Any]:
  """What else result.json holds: the protocol, the training, and what it takes to repeat it."""
  validated = [record for record in records if "validation_accuracy" in record]
  best = max(validated, key=lambda record: record["validation_accuracy"], default=None)
  return {
    "protocol": config.protocol,
    "test_weights": "moving average, last epoch" if config.ema.decay else "last epoch",
    "best_validation": best and {"epoch": best["epoch"], "accuracy": best["validation_accuracy"]},
    "epochs": records[-1]["epoch"],
    "train_seconds": sum(record["seconds"] for record in records),
    "images_per_second": median_rate(records),
    "seed": config.seed,
    "config": json.loads(config.to_json()),
    "versions": get_versions(),
    "commit": get_commit(),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }


def _say_result(log: RunLog, result: dict[str, Any], workdir: pathlib.Path) -> None:
  log.say(f"test accuracy {result['test_accuracy']:.2%}, loss {result['test_loss']:.4f}")
  if result["best_validation"]:
    best = result["best_validation"]
    peeked = " (on the test split)" if result["protocol"] == "published" else ""
    log.say(f"best validation accuracy {best['accuracy']:.2%}{peeked}, epoch {best['epoch']}")
  log.say(f"result    {workdir / 'result.json'}")
  for picture in sorted(workdir.glob("*.png")):
    log.say(f"picture   {picture}")
