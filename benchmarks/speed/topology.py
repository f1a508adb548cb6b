"""The training step compiled for TPUs and GPUs that are not here: memory and collectives.

Command     python -m benchmarks.speed.topology [--networks NAME ...] [--topologies NAME ...]
                [--batch N] [--dtype bfloat16] [--json FILE]

It needs `pip install -e '.[tpu]'` and no TPU, or `'.[cuda]'` and no GPU: JAX compiles ahead of time
for a description of the chips. A topology is KIND:SHAPE, as v5e:2x2 for four chips, v5e:16x16 for
256, or h100:1x4 for one host with four GPUs, whose programs tell no operations. The batch is that
of a chip. With --json the record of each program is kept in FILE, and those there are not made
again.

Nothing is run, so the seconds are an estimate, a roofline: the most of arithmetic and memory
traffic at the chip's peak, plus the bytes that the collectives move over its links, plus
HOP_SECONDS for each hop of each of them. A second table tells from the programs for four chips how
many images a chip needs so that 8, 64 and 256 chips spend 90 % of a step on arithmetic.
"""

import argparse
import functools
import math
import os
import re
import time
from typing import Any, NamedTuple

from benchmarks import common
from benchmarks.speed import step_worker
from flax_cifar import errors
from flax_cifar.tools import command_line

NETWORKS = ("pyramid", "dilated", "ghost", "skip")
TOPOLOGIES = ("v5e:2x2", "v5e:16x16", "v6e:2x2")
HOP_SECONDS = 1e-6  # from a chip to its neighbour, an assumption
SCALED = ("2x4", "8x8", "16x16")
EFFICIENCY = 0.9


class Chip(NamedTuple):
  """Peaks of one chip; bytes of its links in both directions together."""

  flops: float  # per second in bfloat16
  memory_bytes: float  # per second
  link_bytes: float  # per second


# Source: cloud.google.com/tpu/docs/v5e and /v6e, "System architecture".
CHIPS = {"v5e": Chip(197e12, 819e9, 200e9), "v6e": Chip(918e12, 1640e9, 448e9)}

# What XLA's GPU compiler asks a device for. Source: CUDA's device properties of an H100 SXM.
GPUS = {
  "h100": """
    gpu_device_info {
      threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
      shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
      device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
      cuda_compute_capability { major: 9 }
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }
    platform_name: "CUDA"
    dnn_version_info { major: 9 minor: 8 }
    runtime_version { major: 12 minor: 8 }
    device_description_str: "NVIDIA H100 80GB HBM3"
  """
}

# Without them libtpu asks the machine's metadata for its TPUs; our kernels for CPUs are no good.
VARIABLES = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "FLAX_CIFAR_KERNELS": "definition",
}
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
COLLECTIVE = re.compile(
  r"= (?P<shapes>.*?) (?P<kind>all-reduce|all-gather|all-to-all|collective-permute"
  r"|reduce-scatter)(-start)?\("
)


def main() -> None:
  os.environ.update(VARIABLES)
  options = parse_options()
  with command_line.one_line_errors():
    run(options)


def run(options: argparse.Namespace) -> None:
  """Makes the rows that the file of records lacks, and prints all.

  Raises:
    UserError: the file holds no record, or the compiler for a topology is missing.
  """
  path = options.json
  rows = common.read_records(path)[0]["rows"] if path and path.exists() else []
  for topology in options.topologies:
    for network in options.networks:
      wanted = {"network": network, "topology": topology, "batch a chip": options.batch}
      wanted["dtype"] = options.dtype
      if not any(wanted.items() <= row.items() for row in rows):
        rows.append(measure(wanted))
        print(rows[-1], flush=True)
      if path:
        common.write_record(path, rows)
  common.print_table(rows)
  for row in rows:
    if row["topology"].endswith(":2x2") and row["alone ms"]:  # unknown of a GPU
      print(scale(row))


def parse_options() -> argparse.Namespace:
  parser = common.create_parser(__doc__)
  common.add_names(parser, "--networks", list(step_worker.NORMS), NETWORKS)
  parser.add_argument(
    "--topologies",
    nargs="+",
    type=topology_name,
    default=TOPOLOGIES,
    metavar="KIND:SHAPE",
    help="chips and their grid",
  )
  parser.add_argument("--batch", type=common.positive, default=128, help="images per chip")
  parser.add_argument(
    "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of products"
  )
  common.add_json(parser)
  return parser.parse_args()


def topology_name(text: str) -> str:
  """A type of argparse: KIND:SHAPE of known chips, as v5e:2x2."""
  kind, _, shape = text.partition(":")
  if kind not in {**CHIPS, **GPUS} or not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
    kinds = ", ".join([*CHIPS, *GPUS])
    raise argparse.ArgumentTypeError(f"{text!r} is not KIND:SHAPE, as v5e:2x2, of {kinds}")
  return text


def measure(wanted: dict[str, Any]) -> dict[str, Any]:
  """The row of one network on one topology."""
  mesh = create_mesh(wanted["topology"])
  started = time.perf_counter()
  batch_size = wanted["batch a chip"] * mesh.size
  compiled = compile_step(wanted["network"], mesh, batch_size, wanted["dtype"])
  seconds = time.perf_counter() - started
  costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
  collectives = list_collectives(compiled.as_text())
  moved = sum(size for _, size in collectives)
  row = {
    **wanted,
    "chips": mesh.size,
    "compile s": round(seconds),
    "temporaries MiB": round(memory.temp_size_in_bytes / 2**20, 1),
    "collectives": len(collectives),
    "kB moved": round(moved / 1e3, 1),
    **dict.fromkeys(("GFLOP", "alone ms", "exchange ms")),
  }
  kind, shape = wanted["topology"].split(":")
  if kind in CHIPS:
    flops, touched = float(costs["flops"]), float(costs["bytes accessed"])
    exchange = estimate_exchange(CHIPS[kind], shape, moved, len(collectives))
    row["GFLOP"] = round(flops / 1e9, 2)
    row["alone ms"] = round(1e3 * estimate_alone(CHIPS[kind], flops, touched), 3)
    row["exchange ms"] = round(1e3 * exchange, 3)
  return row


def create_mesh(topology: str) -> Any:
  """The mesh of a run of one seed over all chips of `topology`.

  Raises:
    UserError: the compiler for these chips is missing, or knows no such grid.
  """
  import jax
  import numpy as np
  from jax.experimental import topologies

  kind, shape = topology.split(":")
  jax.devices()  # JAX looks for the plug-ins of other platforms now
  platform, name, options = "tpu", topology, {}
  if kind in GPUS:
    platform, name = "cuda", kind
    options = {"topology": f"1x{shape}", "target_config": GPUS[kind]}
  try:
    description = topologies.get_topology_desc(name, platform=platform, **options)
  except (RuntimeError, ValueError) as error:
    raise errors.UserError(
      f"{topology!r} has no compiler here ({errors.shorten(error)}); choose another grid, or "
      f"pip install -e '.[{platform}]'."
    ) from error
  chips: Any = np.array(description.devices).reshape(1, -1)
  return jax.sharding.Mesh(chips, ("seed", "batch"))


def compile_step(network: str, mesh: Any, batch_size: int, dtype: str) -> Any:
  """The step of `flax_cifar.train` for a global batch, compiled for the devices of `mesh`."""
  import jax

  from flax_cifar import train as train_lib
  from flax_cifar.parallel import mesh as mesh_lib
  from flax_cifar.parallel import seeds as seeds_lib

  state, parts = step_worker.create_parts(network, dtype)
  whole, split = mesh_lib.replicated(mesh), mesh_lib.split_batch(mesh)
  images, labels = step_worker.draw_batch(batch_size)
  arguments = (
    jax.tree.map(functools.partial(_describe, sharding=whole), state),
    {"image": _describe(images, split), "label": _describe(labels, split)},
  )
  step = functools.partial(train_lib.train_step, **parts)
  mapped = seeds_lib.map_seeds(step, mesh, num_seeds=1, in_axes=(0, 0))
  jitted = jax.jit(mapped, donate_argnums=0, out_shardings=whole)
  return jitted.lower(*arguments).compile()


def _describe(array: Any, sharding: Any) -> Any:
  import jax

  return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def list_collectives(program: str) -> list[tuple[str, int]]:
  """Kind and bytes of each collective in the text of a compiled program.

  >>> list_collectives("%a = (f32[64]{0}, bf16[2,3]{1,0}) all-reduce(%b, %c), channel_id=1")
  [('all-reduce', 268)]
  """
  found = []
  for match in COLLECTIVE.finditer(program):
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", match["shapes"])
    sizes = (
      ITEM_BYTES[kind] * math.prod(int(side) for side in sides.split(",") if side)
      for kind, sides in shapes
    )
    found.append((match["kind"], sum(sizes)))
  return found


def estimate_alone(chip: Chip, flops: float, touched: float) -> float:
  """Seconds of a chip's own part of a step."""
  return max(flops / chip.flops, touched / chip.memory_bytes)


def estimate_exchange(chip: Chip, shape: str, moved: float, number: int) -> float:
  """Seconds of all exchanges of a step: a ring moves each byte twice, and goes around twice.

  Args:
    chip: of the topology.
    shape: of the topology, as "2x4".
    moved: bytes of all collectives.
    number: of collectives.
  """
  hops = 2 * sum(int(side) for side in shape.split("x"))
  return 2 * moved / chip.link_bytes + number * hops * HOP_SECONDS


def scale(row: dict[str, Any]) -> dict[str, Any]:
  """The images a chip that leave the exchange 10 % of a step, on topologies of SCALED."""
  kind = row["topology"].split(":")[0]
  per_image = row["alone ms"] / 1e3 / row["batch a chip"]
  wanted = {}
  for shape in SCALED:
    exchange = estimate_exchange(CHIPS[kind], shape, 1e3 * row["kB moved"], row["collectives"])
    images = exchange * EFFICIENCY / (1 - EFFICIENCY) / per_image
    wanted[f"{kind}:{shape}"] = math.ceil(round(images, 6))
  return {"network": row["network"], **wanted}


if __name__ == "__main__":
  main()
