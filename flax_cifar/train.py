"""The run, from top to bottom: `train_and_evaluate`, with `train_step` beside it."""

import contextlib
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flax_cifar import pictures
from flax_cifar.checkpoint import Checkpoints, SaveRhythm
from flax_cifar.data.augment_arguments import RULES
from flax_cifar.data.dataset import Split
from flax_cifar.data.feeds import Batch, Call, Feed, create_feed
from flax_cifar.data.mixing import Mixing, create_mixing
from flax_cifar.data.pipeline import Normalize, create_normalize
from flax_cifar.data.splits import load_splits
from flax_cifar.environment import get_hardware
from flax_cifar.errors import UserError, require
from flax_cifar.evaluate import Stop, Stopped, create_eval_step, evaluate, predict
from flax_cifar.interrupt import Interrupted, InterruptGuard
from flax_cifar.layer_table import format_layer_table, get_layer_table
from flax_cifar.losses import create_targets, cross_entropy
from flax_cifar.metrics import (
  Metrics,
  Totals,
  add_totals,
  compute_totals,
  create_totals,
  iterate_steps,
)
from flax_cifar.models import DTYPES, create_model
from flax_cifar.optimizers import create_optimizer
from flax_cifar.partition import check_batch_size, create_mesh, replicated
from flax_cifar.post_mortem import NonFinite, save_post_mortem
from flax_cifar.result import describe_run, format_score, get_judge, say_result, score, summarise
from flax_cifar.run_log import Report, RunLog
from flax_cifar.schedules import create_plateau, create_schedule
from flax_cifar.seeds import first_seed, over_seeds, stack_seeds, take_seed
from flax_cifar.state import (
  TrainState,
  all_finite,
  choose_tree,
  create_train_state,
  update_ema,
)
from flax_cifar.weights import save_weights
from flax_cifar.workdir import (
  check_workdir,
  explain_failed_writes,
  flatten,
  open_workdir,
  read_result,
  without,
  write_json,
)

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

MIXING = 1  # folded into the key of a step, from which dropout draws
FETCH_SECONDS = 1.0  # between two looks at the metrics within an epoch


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  normalize: Normalize,
  mixing: Mixing | None,
  label_smoothing: float,
  ema_decay: float,
) -> tuple[TrainState, Metrics]:
  """One step of gradient descent; pure.

  Args:
    state: the state before it.
    batch: image uint8 (N, H, W, C) and label int32 (N,).
    model: the network.
    optimizer: what `state.opt_state` belongs to.
    normalize: uint8 images -> float images.
    mixing: (images, targets, key) -> (images, targets); None leaves them as they are.
    label_smoothing: see `create_targets`.
    ema_decay: see `update_ema`; 0 switches the average off.

  Returns:
    The state after it; or that before it, marked, if the loss or a gradient is not finite. The
    totals of the batch, see `compute_totals`, and `finite`, bool (). Under mixing the loss is that
    of the mixed targets, while accuracy counts against the labels before it.
  """
  images, labels = normalize(batch["image"]), batch["label"]
  targets = create_targets(labels, model.num_classes, label_smoothing=label_smoothing)
  key = jax.random.fold_in(state.key, state.step)
  if mixing:
    images, targets = mixing(images, targets, jax.random.fold_in(key, MIXING))

  def loss_fn(params: Any) -> Any:
    logits, updates = model.apply(
      {"params": params, "batch_stats": state.batch_stats},
      images,
      train=True,
      rngs={"dropout": key},
      mutable=["batch_stats"],
    )
    losses = cross_entropy(logits, targets)
    return losses.mean(), (losses, logits, updates.get("batch_stats", {}))

  gradients, (losses, logits, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
  updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
  updates = jax.tree.map(lambda update: update * state.plateau.scale, updates)
  params = optax.apply_updates(state.params, updates)
  ema = state.ema
  if ema_decay:
    new = {"params": params, "batch_stats": batch_stats}
    ema = update_ema(ema, new, state.step, ema_decay)
  new_state = state.replace(
    step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema
  )
  # From a bad step on the state stands still, until the host sees it: it can be looked at then.
  finite = state.finite & all_finite((losses, gradients))
  state = choose_tree(finite, new_state, state).replace(finite=finite)
  metrics = compute_totals(losses, logits, labels, jnp.ones(len(labels)))
  return state, metrics | {"finite": finite}


def create_steps_fn(step: Step, feed: Feed, *, num_seeds: int, mesh: Mesh) -> jax.stages.Wrapped:
  """Compiles (state, inputs of `feed`, number of steps) -> (state, metrics of each step).

  The state is donated. The metrics are arrays (steps,), for several seeds (steps, seeds).
  """

  def run(state: TrainState, inputs: Batch, length: int) -> tuple[TrainState, Metrics]:
    def body(state: TrainState, _: None) -> tuple[TrainState, Metrics]:
      return step(state, feed.get_batch(state.key, state.step, inputs))

    if length > 1:
      return jax.lax.scan(body, state, length=length)
    state, metrics = body(state, None)  # no loop, see `steps_per_call`
    return state, jax.tree.map(lambda value: value[None], metrics)

  def run_seeds(state: TrainState, inputs: Batch, length: int) -> tuple[TrainState, Metrics]:
    function = functools.partial(run, length=length)
    return over_seeds(function, num_seeds, (0, feed.seed_axes), out_axes=(0, 1))(state, inputs)

  return jax.jit(run_seeds, static_argnums=2, donate_argnums=0, out_shardings=replicated(mesh))


def train_epoch(
  steps_fn: jax.stages.Wrapped,
  state: TrainState,
  totals: Totals,
  calls: Iterable[Call],
  *,
  done: int,
  stop: Stop,
  report: Report,
) -> tuple[TrainState, Totals, int]:
  """Makes `calls`, or as many until `stop()`, which is asked after each, is true.

  The metrics stay on the device and are fetched now and then, so it never waits for the host.

  Returns:
    The state, `totals` with the sums of these steps added, and the steps of the run now done.

  Raises:
    NonFinite: a loss or gradient is not finite.
  """
  started = fetched = time.perf_counter()
  pending: list[Metrics] = []
  for length, inputs in calls:
    state, metrics = steps_fn(state, inputs, length)
    pending.append(metrics)
    if stop():
      break
    # Not further ahead than one call, lest a signal, or memory, wait for many.
    jax.block_until_ready(pending[-2:-1])
    if time.perf_counter() - fetched > FETCH_SECONDS:
      totals, done = _collect(state, totals, pending[:-1], done, report)
      pending, fetched = pending[-1:], time.perf_counter()
  totals, done = _collect(state, totals, pending, done, report)
  totals = add_totals(totals, {"seconds": time.perf_counter() - started})
  return state, totals, done


def _collect(
  state: TrainState, totals: Totals, calls: list[Metrics], done: int, report: Report
) -> tuple[Totals, int]:
  """Adds steps one by one, so that the sums do not depend on when they were fetched."""
  before = done
  for metrics in iterate_steps(calls):
    finite = metrics.pop("finite")
    if not np.all(finite):
      raise NonFinite(done, number=int(np.argmin(finite)), state=state)
    totals, done = add_totals(totals, metrics), done + 1
  if done > before:
    report(totals, done - before)
  return totals, done


def train_and_evaluate(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains, validates, tests and reports the run that `config` describes.

  The same call again goes on from the latest checkpoint; for a finished run it does nothing.

  Returns:
    What result.json holds.

  Raises:
    UserError: something the user can mend; nothing was overwritten.
    Interrupted: a signal came; the state was saved.
  """
  _check_values(config)
  check_workdir(workdir, config.to_dict())
  result = read_result(workdir)
  if result and result["epochs"] >= config.total_epochs:
    accuracy = format_score(result, "accuracy", ".2%")
    print(f"{workdir} is finished: {get_judge(result)} accuracy {accuracy}")
    return result

  #### Data
  splits = load_splits(protocol=config.protocol, **config.data)
  _check_numbers(config, has_validation=len(splits.validation) > 0)
  mesh, num_seeds = create_mesh(config.num_devices), config.num_seeds
  check_batch_size("batch_size", config.batch_size, mesh)
  check_batch_size("eval_batch_size", config.eval_batch_size, mesh)
  mean, std = config.augment.mean or splits.mean, config.augment.std or splits.std
  feed = _create_feed(config, splits.train, mean=mean, mesh=mesh)
  steps_per_epoch = feed.steps_per_epoch

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
  create_state = functools.partial(
    create_train_state,
    model=model,
    optimizer=optimizer,
    plateau=plateau,
    image_shape=splits.image_shape,
    ema_decay=config.ema.decay,
  )
  states = [create_state(seed=config.seed + number) for number in range(num_seeds)]
  state = jax.device_put(stack_seeds(states), replicated(mesh))

  #### Compiled steps
  normalize = create_normalize(mean, std, dtype=DTYPES[config.compute_dtype])
  step = functools.partial(
    train_step,
    model=model,
    optimizer=optimizer,
    normalize=normalize,
    mixing=create_mixing(**config.mixing),
    label_smoothing=config.loss.label_smoothing,
    ema_decay=config.ema.decay,
  )
  rhythm = SaveRhythm(**without(config.checkpoint.to_dict(), ("keep",)))
  steps_fn = create_steps_fn(step, feed, num_seeds=num_seeds, mesh=mesh)
  eval_step = create_eval_step(model=model, normalize=normalize, mesh=mesh, num_seeds=num_seeds)
  observe = jax.jit(
    over_seeds(lambda state, loss: plateau.update({}, state, value=loss)[1], num_seeds, (0, 0))
  )
  # What does not fit together fails here, early; the first call finds the trace.
  steps_fn.trace(state, feed.first_inputs(), feed.steps_per_call)

  with contextlib.ExitStack() as stack:
    #### Start or resume
    guard = stack.enter_context(InterruptGuard())
    stack.enter_context(explain_failed_writes(workdir))
    stack.enter_context(open_workdir(workdir, config.to_dict()))
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    stack.enter_context(contextlib.closing(checkpoints))
    state, totals, records = checkpoints.restore_or(state, create_totals(num_seeds), mesh)
    done = int(first_seed(state.step, num_seeds))
    least = math.ceil(done / steps_per_epoch)
    expected = f"{least} or more, as the run has come to step {done:,}"
    require(config.total_epochs >= least, "total_epochs", config.total_epochs, expected)
    write_json(workdir / "config.json", config.to_dict())
    table = format_layer_table(get_layer_table(model, splits.image_shape))
    (workdir / "summary.txt").write_text(table)
    log = RunLog(
      workdir,
      records=records,
      step=done,
      total_epochs=config.total_epochs,
      tensorboard=config.log.tensorboard,
    )
    stack.enter_context(contextlib.closing(log))
    parameters = int(parameter_overview.count_parameters(state.params)) // num_seeds
    hardware = get_hardware(mesh.size)
    log.banner(describe_run(config, splits, parameters, hardware, workdir))
    if done:
      log.say(f"resumed at step {done:,}, epoch {done / steps_per_epoch:.2f}")

    #### Epochs
    stack.enter_context(contextlib.closing(feed))
    for epoch in range(len(records), config.total_epochs):
      start, end = epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch
      with log.progress(epoch + 1, done=done - start, total=steps_per_epoch) as report:
        while done < end and not guard.is_caught():
          calls = feed.calls(range(done, rhythm.next_step(done, end)))
          try:
            state, totals, done = train_epoch(
              steps_fn,
              state,
              totals,
              calls,
              done=done,
              stop=lambda: guard.is_caught() or rhythm.is_time(),
              report=report,
            )
          except NonFinite as error:
            raise _describe_non_finite(error, feed, num_seeds, workdir) from error
          if done < end and rhythm.is_due(done, None):
            checkpoints.save(done, state, totals, log.records)
      validation, complete = None, done == end
      if complete and len(splits.validation):
        try:
          validation = evaluate(
            eval_step,
            state.eval_variables,
            splits.validation,
            config.eval_batch_size,
            stop=guard.is_caught,
          )
        except Stopped:
          complete = False  # the next process validates first
      if complete:
        share = np.float64(schedule(end - 1) * state.plateau.scale)
        if on_plateau and validation:
          state = state.replace(plateau=observe(state.plateau, validation["loss"]))
        log.write(
          epoch=epoch + 1,
          step=end,
          learning_rate=config.optimizer.learning_rate * share,
          train=totals,
          validation=validation,
        )
        totals = create_totals(num_seeds)
      signum = guard.signum  # read once: a signal after the save must wait for the next one
      if signum or epoch + 1 == config.total_epochs or rhythm.is_due(done, epoch + 1):
        checkpoints.save(done, state, totals, log.records, validation)
      if signum:
        raise Interrupted(signum, done)
      if config.log.pictures:  # not earlier, lest the first step wait for it
        _show_augmented(workdir / "augmented.png", feed, splits.class_names)

    #### Test, once; a trial does not
    judge = splits.get_judge()
    try:
      logits = predict(
        eval_step, state.eval_variables, judge, config.eval_batch_size, stop=guard.is_caught
      )
    except Stopped:
      raise Interrupted(guard.signum or 0, done) from None
    save_weights(
      workdir / "weights.safetensors",
      first_seed(state.eval_variables, num_seeds),
      config=config.to_dict(),
      class_names=splits.class_names,
      image_shape=splits.image_shape,
      mean=mean,
      std=std,
    )
    checkpoints.wait()  # a run is not finished before its last checkpoint is written
    result = {
      **score(splits.judge, judge, logits),
      **summarise(config, log.records),
      "parameters": parameters,
      "hardware": hardware,
    }
    if config.log.pictures:
      _show_augmented(workdir / "augmented.png", feed, splits.class_names)
      first = first_seed(logits, num_seeds)
      pictures.save_misclassified(workdir / "misclassified.png", judge, first, splits.class_names)
      pictures.save_curves(workdir / "curves.png", log.records)
      pictures.save_learning_rate(workdir / "learning_rate.png", log.records)
    write_json(workdir / "result.json", result)  # last: it says that the run is finished
    say_result(log, result, workdir)
  return result


def _show_augmented(path: pathlib.Path, feed: Feed, class_names: tuple[str, ...]) -> None:
  """Draws the first batch of the run, where it is not yet drawn."""
  if not path.exists():
    pictures.save_augmented(path, feed.look_up(0), class_names)


def _describe_non_finite(
  error: NonFinite, feed: Feed, num_seeds: int, workdir: pathlib.Path
) -> UserError:
  path = save_post_mortem(
    workdir,
    step=error.step,
    state=take_seed(error.state, num_seeds, error.number),
    batch=feed.look_up(error.step, error.number),
  )
  return UserError(
    f"{error}. The checkpoints are kept, and {str(path)!r} has the state before that step and its "
    "batch. Lower optimizer.learning_rate, or warm up with schedule.name=cosine or one_cycle."
  )


def _create_feed(config: ConfigDict, split: Split, *, mean: tuple[float, ...], mesh: Mesh) -> Feed:
  names = ("batch_size", "total_epochs", "steps_per_call", "seed", "num_seeds")
  return create_feed(
    split,
    mean=mean,
    mesh=mesh,
    **{name: config[name] for name in names},
    **{name: config.augment[name] for name in ("backend", "workers", "ops", *RULES)},
  )


def _check_values(config: ConfigDict) -> None:
  """What no key may hold; the modules that use them know the rest."""
  for key, value in flatten(config.to_dict()).items():
    require(value is not None, key, value, "set; configs/common.py has its default")
    require(not isinstance(value, float) or math.isfinite(value), key, value, "finite")
  shown = config.name.isprintable() and len(config.name) <= 100
  require(shown, "name", config.name, "up to 100 printable characters")


def _check_numbers(config: ConfigDict, *, has_validation: bool) -> None:
  smoothing = config.loss.label_smoothing
  require(config.total_epochs > 0, "total_epochs", config.total_epochs, "1 or more")
  require(config.checkpoint.keep > 0, "checkpoint.keep", config.checkpoint.keep, "1 or more")
  require(0 <= config.ema.decay < 1, "ema.decay", config.ema.decay, "at least 0 and below 1")
  require(0 <= smoothing < 1, "loss.label_smoothing", smoothing, "at least 0 and below 1")
  require(
    has_validation or config.schedule.name != "plateau",
    "data.validation_size",
    config.data.validation_size,
    "positive where schedule.name='plateau'",
  )
