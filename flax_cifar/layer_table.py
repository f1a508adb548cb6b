"""The layer table of a network: shapes, parameters, multiply-adds and receptive fields."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flax_cifar.models.blocks import GlobalAveragePool, MaxPool
from flax_cifar.models.norms import BatchNorm, GroupNorm

READ, WROTE = "layer reads ", "layer wrote "  # marks in the trace, a layer's number follows
LEAVES = (nn.Conv, nn.Dense, BatchNorm, GroupNorm, MaxPool, GlobalAveragePool)


@dataclasses.dataclass(frozen=True)
class Field:
  """What one position of a feature map sees, as (height, width) in input pixels.

  Attributes:
    size: extent of the receptive field.
    jump: distance between the fields of neighbouring positions.
  """

  size: tuple[int, int] = (1, 1)
  jump: tuple[int, int] = (1, 1)

  def after_window(self, window: tuple[int, int], stride: tuple[int, int]) -> "Field":
    """The field after a window operation; `window` is its extent with dilation."""
    size = [s + (w - 1) * j for s, w, j in zip(self.size, window, self.jump, strict=True)]
    jump = [j * s for j, s in zip(self.jump, stride, strict=True)]
    return Field((size[0], size[1]), (jump[0], jump[1]))


@dataclasses.dataclass(frozen=True)
class Row:
  """One layer. Shapes are (H, W, C); `field` is None where a position sees the whole image."""

  name: str
  kind: str
  output_shape: tuple[int, ...]
  parameters: int
  multiply_adds: int
  field: Field | None


def get_layer_table(model: nn.Module, image_shape: tuple[int, int, int]) -> list[Row]:
  """Rows of `model` in execution order for images of shape (H, W, C).

  Nothing is computed: the model is traced with abstract values. Each layer's input and output are
  marked in the trace and the fields followed from mark to mark, so that what joins the layers
  (ReLU, padding, sums) need not be known.
  """
  modules: list[nn.Module] = []
  rows: list[Row] = []

  def mark(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    module = context.module
    if context.method_name != "__call__" or not isinstance(module, LEAVES):
      return next_fun(*args, **kwargs)
    number = str(len(modules))
    y = next_fun(checkpoint_name(args[0], READ + number), *args[1:], **kwargs)
    modules.append(module)
    rows.append(_create_row(module, args[0], y))
    return checkpoint_name(y, WROTE + number)

  def forward(images: jax.Array) -> Any:
    return model.init_with_output(jax.random.key(0), images, train=False)

  with nn.intercept_methods(mark):
    trace = jax.make_jaxpr(forward)(jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
  fields = _follow_fields(trace.jaxpr, modules)
  return [dataclasses.replace(row, field=field) for row, field in zip(rows, fields, strict=True)]


def _follow_fields(jaxpr: Any, modules: list[nn.Module]) -> list[Field | None]:
  """The field of each module's output; `jaxpr` has the images as its only input."""
  known: dict[Any, Field | None] = {jaxpr.invars[0]: Field()}  # without what sees no image
  read: dict[str, Field | None] = {}
  written: list[Field | None] = []
  for equation in jaxpr.eqns:
    inputs = [known[v] for v in equation.invars if not hasattr(v, "val") and v in known]
    if not inputs:
      continue
    field = _union(inputs)
    name = equation.params.get("name", "") if equation.primitive.name == "name" else ""
    if name.startswith(READ):
      read[name.removeprefix(READ)] = field
    elif name.startswith(WROTE):
      number = name.removeprefix(WROTE)
      field = _layer_field(modules[int(number)], read[number])
      written.append(field)
    known |= dict.fromkeys(equation.outvars, field)
  return written


def _union(fields: list[Field | None]) -> Field | None:
  """The field of what is computed from all of them; None, the whole image, wins."""
  seen = [field for field in fields if field]
  if len(seen) < len(fields):
    return None
  heights, widths = zip(*(field.size for field in seen), strict=True)
  return Field((max(heights), max(widths)), seen[0].jump)


def _layer_field(module: nn.Module, field: Field | None) -> Field | None:
  if isinstance(module, GlobalAveragePool | nn.Dense) or field is None:
    return None
  if isinstance(module, MaxPool):
    return field.after_window((module.window,) * 2, (module.window,) * 2)
  if isinstance(module, nn.Conv):
    dilation, stride = _pair(module.kernel_dilation), _pair(module.strides)
    sides = _pair(module.kernel_size)
    extent = [(k - 1) * d + 1 for k, d in zip(sides, dilation, strict=True)]
    return field.after_window((extent[0], extent[1]), stride)
  return field


def _pair(value: Any) -> tuple[int, int]:
  if value is None:
    return 1, 1
  return (value, value) if isinstance(value, int) else tuple(value)


def _create_row(module: nn.Module, x: jax.Array, y: jax.Array) -> Row:
  parameters = jax.tree.leaves(module.variables.get("params", {}))
  multiply_adds = 0
  if isinstance(module, nn.Conv):
    taps = math.prod(_pair(module.kernel_size)) * (x.shape[-1] // module.feature_group_count)
    multiply_adds = math.prod(y.shape[1:]) * taps
  elif isinstance(module, nn.Dense):
    multiply_adds = x.shape[-1] * y.shape[-1]
  return Row(
    name="/".join(module.path),
    kind=_describe(module),
    output_shape=y.shape[1:],
    parameters=sum(leaf.size for leaf in parameters),
    multiply_adds=multiply_adds,
    field=None,
  )


def _describe(module: nn.Module) -> str:
  if isinstance(module, nn.Dense):
    return "dense"
  if not isinstance(module, nn.Conv):
    return type(module).__name__
  height, width = _pair(module.kernel_size)
  dilation = _pair(module.kernel_dilation)
  text = f"conv {height}x{width}"
  if dilation != (1, 1):
    text += f" dilation {dilation[0]}"
  if _pair(module.strides) != (1, 1):
    text += f" stride {_pair(module.strides)[0]}"
  if module.feature_group_count > 1:
    text += f" groups {module.feature_group_count}"
  return text


def receptive_field(rows: list[Row]) -> tuple[int, int]:
  """(height, width) in pixels of the last layer before the global pool or dense layers."""
  return [row.field.size for row in rows if row.field][-1]


def format_layer_table(rows: list[Row]) -> str:
  """The rows as aligned text with a line of totals."""
  head = ("layer", "operation", "output", "parameters", "multiply-adds", "field", "jump")
  cells = [head] + [_format_row(row) for row in rows]
  total = f"{sum(row.parameters for row in rows):,}"
  work = f"{sum(row.multiply_adds for row in rows):,}"
  cells.append(("total", "", "", total, work, _format_pair(receptive_field(rows)), ""))
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = []
  for row in cells:
    left = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
    lines.append("  ".join(left + right).rstrip())
  rule = "-" * max(map(len, lines))
  return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]]) + "\n"


def _format_row(row: Row) -> tuple[str, ...]:
  return (
    row.name,
    row.kind,
    "x".join(map(str, row.output_shape)),
    f"{row.parameters:,}",
    f"{row.multiply_adds:,}",
    _format_pair(row.field.size) if row.field else "all",
    _format_pair(row.field.jump) if row.field else "",
  )


def _format_pair(pair: tuple[int, int]) -> str:
  return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"
