"""One step in a process of its own, so that libraries' threads and settings stay apart.

Command     python -m benchmarks.speed.step_worker MODE NETWORK BATCH [TASK]

It prints one line of JSON when it is ready, with the seconds of the first step and the library;
then, for each line with a number that it reads, the seconds that so many steps took; at the end of
its input, the most memory it had, in MiB. MODE is a key of MODES. TASK is train (the default), a
training step, or predict, from images in bytes to logits.
"""

import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Step = Callable[[], Any]  # runs one step and returns when it is done
TASKS = ("train", "predict")

# The norm and the dropout rate with which each network was published.
NORMS = {
  "dilated": "batch",
  "ghost": "ghost",
  "skip": "batch",
  "pyramid": "batch",
  "skip_dilated": "batch",
  "keras_base": "none",
  "keras_fcn": "batch",
  "five_convs": "batch",
  "sprint": "batch",
  "sprint_wide": "batch",
  "tiny50k": "batch",
  "tiny100k": "batch",
  "tiny200k": "batch",
  "tiny700k": "batch",
  "wide": "batch",
}
OWN = ("sprint", "sprint_wide", "tiny50k", "tiny100k", "tiny200k", "tiny700k", "wide")
DROPOUT = dict.fromkeys(NORMS, 0.05) | {"ghost": 0.1, "keras_base": 0.25} | dict.fromkeys(OWN, 0.0)


def main() -> None:
  mode, network, batch_size, *rest = sys.argv[1:]
  started = time.perf_counter()
  step = MODES[mode](network, int(batch_size), *rest)
  step()
  ready = {"first_step": time.perf_counter() - started, "library": get_library(mode)}
  print(json.dumps(ready), flush=True)
  for line in sys.stdin:
    started = time.perf_counter()
    for _ in range(int(line)):
      step()
    print(time.perf_counter() - started, flush=True)
  print(get_peak_memory())


def get_library(mode: str) -> str:
  """The one that computes, with its version; it is imported by now."""
  library = sys.modules["torch" if mode.startswith("PyTorch") else "jax"]
  return f"{library.__name__} {library.__version__}"


def get_peak_memory() -> float:
  """The most resident memory of this process, in MiB."""
  units = 2**20 if sys.platform == "darwin" else 2**10
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units


def draw_batch(batch_size: int) -> tuple[np.ndarray, np.ndarray]:
  """Noise as images uint8 (N, 32, 32, 3), and labels int32 (N,)."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (batch_size, 32, 32, 3), np.uint8)
  return images, rng.integers(0, 10, batch_size).astype(np.int32)


# ---- Flax


def create_ours(
  network: str,
  batch_size: int,
  task: str = "train",
  *,
  kernels: str = "auto",
  dtype: str = "float32",
) -> Step:
  """The step of `flax_cifar.train`, or its model alone, under the settings of main.py."""
  from flax_cifar import environment

  os.environ["FLAX_CIFAR_KERNELS"] = kernels
  environment.apply_settings()
  return CREATE_FLAX[task](network, batch_size, dtype)


def create_without_onednn(network: str, batch_size: int, task: str = "train") -> Step:
  """As where pip finds no oneDNN, such as on macOS and ARM: C++ compiled here, else XLA."""
  from flax_cifar.kernels.onednn import library

  setattr(library, "load_library", lambda: None)  # noqa: B010, mypy refuses an assignment
  return create_ours(network, batch_size, task, kernels="native")


def create_naive(network: str, batch_size: int, task: str = "train") -> Step:
  """Flax out of the box: lax convolutions, Flax's norm and dropout, no settings.

  The ghost norm is ours: Flax has none.
  """
  os.environ["FLAX_CIFAR_KERNELS"] = "definition"
  import flax.linen as nn

  from flax_cifar.models import dropout, norms

  class BatchNorm(nn.Module):
    momentum: float
    epsilon: float
    train_scale: bool
    relu: bool

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
      norm = nn.BatchNorm(not train, momentum=self.momentum, epsilon=self.epsilon)
      return nn.relu(norm(x)) if self.relu else norm(x)

  class Dropout(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
      return nn.Dropout(self.rate, deterministic=not train)(x)

  norms.NORMS["batch"] = BatchNorm
  setattr(dropout, "Dropout", Dropout)  # noqa: B010, mypy refuses an assignment
  return CREATE_FLAX[task](network, batch_size, "float32")


def create_parts(network: str, dtype: str = "float32") -> tuple[Any, dict[str, Any]]:
  """A state and the arguments of train_step, for the network as it was published."""
  from flax_cifar import optim
  from flax_cifar import state as state_lib
  from flax_cifar.configs import common
  from flax_cifar.data.augment import normalize
  from flax_cifar.run import config as config_lib

  config = common.get_config()
  config.model.update(name=network, norm=NORMS[network], dropout_rate=DROPOUT[network])
  config.compute_dtype = dtype
  model = config_lib.create_model(config, num_classes=10)
  schedule = optim.create_schedule(steps_per_epoch=100, total_epochs=10, **config.schedule)
  optimizer = optim.create_optimizer(schedule, **config.optimizer)
  state = state_lib.create_train_states(
    model=model,
    optimizer=optimizer,
    plateau=optim.create_plateau(enabled=False, **config.schedule.plateau),
    images=np.zeros((1, 32, 32, 3), np.float32),
    ema_decay=0,
    seeds=[0],
  )[0]
  return state, {
    "model": model,
    "optimizer": optimizer,
    "normalize": normalize.create_normalize((0.5,) * 3, (0.25,) * 3, dtype=dtype),
    "mixing": None,
    "label_smoothing": 0.0,
    "distillation": None,
    "ema_decay": 0.0,
  }


def _create_flax_step(network: str, batch_size: int, dtype: str) -> Step:
  import jax

  from flax_cifar import train as train_lib

  state, parts = create_parts(network, dtype)
  step_fn = jax.jit(functools.partial(train_lib.train_step, **parts), donate_argnums=0)
  images, labels = draw_batch(batch_size)
  batch = {"image": images, "label": labels}

  def step() -> None:
    nonlocal state
    state, metrics = step_fn(state, batch)
    jax.block_until_ready(metrics)

  return step


def _create_flax_prediction(network: str, batch_size: int, dtype: str) -> Step:
  import jax

  state, parts = create_parts(network, dtype)
  model, normalize = parts["model"], parts["normalize"]
  predict = jax.jit(lambda variables, images: model.apply(variables, normalize(images), False))
  images, _ = draw_batch(batch_size)
  return lambda: predict(state.eval_variables, images).block_until_ready()


CREATE_FLAX = {"train": _create_flax_step, "predict": _create_flax_prediction}


def create_matmul(network: str, batch_size: int, task: str = "train") -> Step:
  """2048 x 2048 matrices, float32, in XLA: the rate that convolutions are held against."""
  del network, batch_size, task
  import jax
  import jax.numpy as jnp

  matrix = jnp.ones((2048, 2048))
  multiply = jax.jit(jnp.dot)
  return lambda: multiply(matrix, matrix).block_until_ready()


# ---- PyTorch


def create_torch(
  network: str,
  batch_size: int,
  task: str = "train",
  *,
  channels_last: bool = False,
  bfloat16: bool = False,
  compiled: bool = False,
) -> Step:
  """PyTorch with the optimizer of its source, on a GPU if there is one."""
  import torch
  import torch.nn.functional as F

  from benchmarks.speed import torch_networks
  from flax_cifar import environment

  torch.set_num_threads(environment.count_cores())
  layout = torch.channels_last if channels_last else torch.contiguous_format
  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = torch_networks.TORCH_NETWORKS[network]().to(device, memory_format=layout)
  forward = torch.compile(model) if compiled else model
  optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
  numpy_images, numpy_labels = draw_batch(batch_size)
  images = torch.from_numpy(numpy_images).permute(0, 3, 1, 2).to(device)
  labels = torch.from_numpy(numpy_labels).long().to(device)

  def compute() -> Any:
    x = ((images / 255 - 0.5) / 0.25).contiguous(memory_format=layout)
    with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
      return forward(x)

  def train() -> None:
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(compute().float(), labels).backward()
    optimizer.step()

  def predict() -> None:
    with torch.inference_mode():
      compute()

  def step() -> None:
    train() if task == "train" else predict()
    if device == "cuda":
      torch.cuda.synchronize()

  model.train(task == "train")
  return step


MODES: dict[str, Callable[..., Step]] = {  # called with network, batch size and task
  "ours": create_ours,
  "ours bf16": functools.partial(create_ours, dtype="bfloat16"),
  "ours, without oneDNN": create_without_onednn,
  "ours, XLA alone": functools.partial(create_ours, kernels="xla"),
  "naive Flax": create_naive,
  "PyTorch": create_torch,
  "PyTorch channels_last": functools.partial(create_torch, channels_last=True),
  "PyTorch bf16": functools.partial(create_torch, bfloat16=True),
  "PyTorch channels_last bf16": functools.partial(create_torch, channels_last=True, bfloat16=True),
  "PyTorch compiled": functools.partial(create_torch, channels_last=True, compiled=True),
  "PyTorch compiled bf16": functools.partial(
    create_torch, channels_last=True, bfloat16=True, compiled=True
  ),
  "matmul": create_matmul,
}

if __name__ == "__main__":
  main()
