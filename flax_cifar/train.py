"""The run, from top to bottom: `train_and_evaluate`; below it an epoch, and a step."""

import contextlib
import pathlib
import time
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from flax_cifar import evaluate, metrics, optim, signals
from flax_cifar import state as state_lib
from flax_cifar.data import batches, feeds
from flax_cifar.data import splits as splits_lib
from flax_cifar.data.augment import mixing as mixing_lib
from flax_cifar.data.augment import normalize as normalize_lib
from flax_cifar.models import layer_table
from flax_cifar.parallel import agreement, watchdog
from flax_cifar.parallel import mesh as mesh_lib
from flax_cifar.parallel import seeds as seeds_lib
from flax_cifar.run import checkpoint, nonfinite, plots, teacher
from flax_cifar.run import config as config_lib
from flax_cifar.run import log as log_lib
from flax_cifar.run import result as result_lib
from flax_cifar.run import setup as setup_lib
from flax_cifar.run import workdir as workdir_lib

MIXING = 1  # folded into the key of a step, from which dropout draws
FETCH_SECONDS = 1.0  # between two looks at the metrics within an epoch


def train_and_evaluate(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains, validates, tests and reports the run that `config` describes.

  The same call again goes on from the latest checkpoint; for a finished run it does nothing. All
  processes of a run make it.

  Returns:
    The content of result.json.

  Raises:
    UserError: something the user can fix; nothing was overwritten.
    Interrupted: a signal came; the state was saved.
  """
  config = workdir_lib.settle(config, workdir)
  if finished := result_lib.find_finished(config, workdir):
    return finished
  with agreement.share_errors():  # one machine alone may lack a teacher
    setup_lib.check_choices(config)  # before a download
  # ---- Data
  with watchdog.paused(), agreement.share_errors():  # one machine alone may lack them
    splits = splits_lib.load_splits(protocol=config.protocol, **config.data)
    fingerprint = splits.fingerprint | teacher.get_fingerprint(config)
  agreement.check_same(result_lib.list_shared(config, fingerprint))
  agreement.by_first(workdir_lib.check_data)(workdir, fingerprint)
  config_lib.check_numbers(config, has_validation=len(splits.validation) > 0)
  mesh, num_seeds = mesh_lib.create_mesh(config.num_devices, config.num_seeds), config.num_seeds
  mesh_lib.check_batch_sizes(
    mesh, config.batch_size, config.eval_batch_size, num_examples=len(splits.train)
  )
  mean, std = config_lib.choose_normalization(config.augment, splits)

  # ---- Network, optimizer, state, compiled steps
  with config_lib.explain_exhausted(config):
    setup = setup_lib.create_setup(
      config,
      train_step,
      splits.train,
      class_names=splits.class_names,
      mean=mean,
      std=std,
      mesh=mesh,
    )
  feed, eval_step = setup.feed, setup.eval_step
  policy = checkpoint.create_policy(config.checkpoint)
  with config_lib.explain_misfit(config):  # keys that do not fit together fail here, early
    setup.steps_fn.trace(setup.state, feed.example_inputs(), feed.steps_per_call)
    layers = layer_table.get_layer_table(setup.model, splits.image_shape)

  # Left in reverse: explain a non-finite step, save if stopped, close the feed, the log and the
  # checkpoints, unlock the folder, explain failed writes, give the signals back, explain too little
  # memory.
  with contextlib.ExitStack() as stack:
    # ---- Start or resume
    stack.enter_context(config_lib.explain_exhausted(config))
    guard = stack.enter_context(signals.InterruptGuard())

    def stop() -> bool:
      return agreement.any_process(guard.is_caught())

    stack.enter_context(workdir_lib.explain_failed_writes(workdir))
    stack.enter_context(workdir_lib.open_workdir(workdir, config.to_dict()))
    checkpoints = stack.enter_context(
      checkpoint.Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    )
    start = state_lib.Progress(0, setup.state, metrics.create_totals(num_seeds), [])
    progress = checkpoints.restore_or(start, mesh)
    config_lib.check_progress(progress, config.total_epochs, feed.steps_per_epoch)
    workdir_lib.write_start(workdir, config.to_dict(), fingerprint, layers)
    log = log_lib.RunLog(workdir, progress, config=config.to_dict())
    stack.enter_context(contextlib.closing(log))
    facts = result_lib.get_facts(progress.state.params, num_seeds, mesh)
    log.banner(result_lib.describe_run(config, splits, facts, workdir))
    log.print_resumed(progress, feed.steps_per_epoch)
    stack.enter_context(contextlib.closing(feed))
    stack.enter_context(checkpoints.save_when_stopped(progress, guard))
    stack.enter_context(nonfinite.dump_and_explain(feed, num_seeds, mesh, workdir))

    # ---- Epochs
    for epoch in range(len(progress.records), config.total_epochs):
      train_epoch(
        progress,
        epoch,
        steps_fn=setup.steps_fn,
        feed=feed,
        checkpoints=checkpoints,
        policy=policy,
        guard=guard,
        log=log,
      )
      variables = progress.state.eval_variables
      validation = evaluate.validate(
        eval_step, variables, splits.validation, config.eval_batch_size, stop=stop
      )
      factor = optim.compute_lr_factor(
        setup.schedule, progress.step - 1, progress.state.plateau, mesh
      )
      record = metrics.create_record(
        epoch=epoch + 1,
        step=progress.step,
        total_epochs=config.total_epochs,
        learning_rate=config.optimizer.learning_rate * factor,
        train=progress.totals,
        validation=validation,
        commit=facts["commit"],
      )
      if setup.plateau.enabled and validation:
        seen = setup.observe(progress.state.plateau, validation["loss"])
        progress.state = progress.state.replace(plateau=seen)
      log.write(record)
      progress.records.append(record)
      progress.totals = metrics.create_totals(num_seeds)
      if epoch + 1 == config.total_epochs or stop() or policy.is_due(progress.step, epoch + 1):
        checkpoints.save(progress, validation)
        policy.mark_saved()
      # Once, and only now, so that drawing does not delay the first step.
      if config.log.pictures and log.writes and not guard.is_caught():
        plots.save_first_batch(workdir / "augmented.png", feed, splits.class_names)

    # ---- Test, once; a trial scores its validation images instead
    variables = progress.state.eval_variables
    logits = evaluate.predict(
      eval_step, variables, splits.final_split, config.eval_batch_size, stop=stop
    )
    checkpoints.wait()  # a run is not finished before its last checkpoint is written
    return result_lib.finish_run(
      workdir,
      config=config,
      splits=splits,
      feed=feed,
      records=progress.records,
      variables=seeds_lib.select(mesh_lib.fetch(variables, mesh), num_seeds),
      logits=logits,
      mean=mean,
      std=std,
      facts=facts,
      log=log,
    )


def train_epoch(
  progress: state_lib.Progress,
  epoch: int,
  *,
  steps_fn: jax.stages.Wrapped,
  feed: feeds.Feed,
  checkpoints: checkpoint.Checkpoints,
  policy: checkpoint.SavePolicy,
  guard: signals.InterruptGuard,
  log: log_lib.RunLog,
) -> None:
  """Trains `epoch` (from 0) from where `progress` stands to its end, and saves on the way.

  Raises:
    Stopped: `guard`, which is asked after each chunk of steps, has caught a signal.
    NonFinite: a loss or gradient is not finite.
  """
  end = (epoch + 1) * feed.steps_per_epoch
  done = progress.step - epoch * feed.steps_per_epoch
  with log.progress(epoch + 1, done=done, total=feed.steps_per_epoch) as report:
    while progress.step < end:
      if agreement.any_process(guard.is_caught()):
        raise signals.Stopped
      chunks = feed.chunks(range(progress.step, policy.next_step(progress.step, end)))
      train_chunks(progress, chunks, steps_fn, guard, policy, report)
      if progress.step < end and policy.is_due(progress.step, None):
        checkpoints.save(progress)
        policy.mark_saved()


def train_chunks(
  progress: state_lib.Progress,
  chunks: Iterable[batches.Chunk],
  steps_fn: jax.stages.Wrapped,
  guard: signals.InterruptGuard,
  policy: checkpoint.SavePolicy,
  report: log_lib.Report,
) -> None:
  """Runs `chunks`, or as many until `guard` has caught a signal or it is time to save.

  The metrics stay on the device and are fetched now and then, so it never waits for the host.

  Raises:
    NonFinite: a loss or gradient is not finite.
  """
  started = fetched = time.perf_counter()
  pending: list[metrics.Metrics] = []
  for length, inputs in chunks:
    with jax.transfer_guard("disallow"):  # a hidden copy is an error
      progress.state, sums = steps_fn(progress.state, inputs, length)
    pending.append(sums)
    is_old = time.perf_counter() - fetched > FETCH_SECONDS
    # One exchange between processes answers both questions.
    ends, fetches = agreement.largest(guard.is_caught() or policy.is_time(), is_old)
    if ends:
      break
    # At most one call is in flight, so a signal is handled promptly and memory stays bounded.
    jax.block_until_ready(pending[-2:-1])
    if fetches:
      _collect(progress, pending[:-1], report)
      pending, fetched = pending[-1:], time.perf_counter()
  _collect(progress, pending, report)
  progress.totals = metrics.add_totals(progress.totals, {"seconds": time.perf_counter() - started})


def _collect(
  progress: state_lib.Progress, chunks: list[metrics.Metrics], report: log_lib.Report
) -> None:
  """Adds steps one by one, so that the sums do not depend on when they were fetched."""
  before = progress.step
  for sums in metrics.iterate_steps(chunks):
    finite = sums.pop("finite")
    if not np.all(finite):
      raise nonfinite.NonFinite(progress.step, int(np.argmin(finite)), progress.state)
    progress.totals = metrics.add_totals(progress.totals, sums)
    progress.step += 1
  if progress.step > before:
    report(progress.totals, progress.step - before)


def train_step(
  state: state_lib.TrainState,
  batch: batches.Batch,
  *,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  normalize: normalize_lib.Normalize,
  mixing: mixing_lib.Mixing | None,
  label_smoothing: float,
  distillation: teacher.Distillation | None,
  ema_decay: float,
) -> tuple[state_lib.TrainState, metrics.Metrics]:
  """One step of gradient descent; pure.

  Args:
    state: the state before it.
    batch: image uint8 (N, H, W, C) and label int32 (N,).
    model: the network.
    optimizer: whose state `state.opt_state` is.
    normalize: uint8 images -> float images.
    mixing: (images, targets, key) -> (images, targets); None leaves them as they are.
    label_smoothing: see `metrics.create_targets`.
    distillation: (losses, logits, images) -> losses, with a teacher's part; None has no teacher.
    ema_decay: see `state.update_ema`; 0 switches the average off.

  Returns:
    The state after it; or the state before it, marked, if the loss or a gradient is not finite. The
    totals of the batch, see `metrics.compute_totals`, and `finite`, bool (). The loss is the one
    that is minimized: of mixed targets, and with the teacher's part under distillation; accuracy
    counts against the labels of the batch.
  """
  images, labels = normalize(batch["image"]), batch["label"]
  targets = metrics.create_targets(labels, model.num_classes, label_smoothing=label_smoothing)
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
    losses = metrics.cross_entropy(logits, targets)
    if distillation:
      losses = distillation(losses, logits, images)
    return losses.mean(), (losses, logits, updates.get("batch_stats", {}))

  gradients, (losses, logits, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
  gradients = mesh_lib.replicate(gradients)
  updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
  updates = jax.tree.map(lambda update: update * state.plateau.scale, updates)
  params = optax.apply_updates(state.params, updates)
  ema = state.ema
  if ema_decay:
    averaged = {"params": params, "batch_stats": batch_stats}
    ema = state_lib.update_ema(ema, averaged, state.step, ema_decay)
  new_state = state.replace(
    step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema
  )
  # After a non-finite step the state is frozen, so the host can inspect it.
  sums = metrics.compute_totals(losses, logits, labels, jnp.ones(len(labels)))
  finite = state.finite & state_lib.all_finite((sums["loss_sum"], gradients))
  state = state_lib.choose_tree(finite, new_state, state).replace(finite=finite)
  return state, sums | {"finite": finite}
