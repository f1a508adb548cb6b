"""The layer table of a network: shapes, parameters, multiply-adds and receptive fields."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flax_cifar.models import blocks, norms

READ, WROTE = "layer reads ", "layer wrote "  # marks in the trace, before a layer's number
LEAVES = (
  nn.Conv,
  nn.Dense,
  norms.BatchNorm,
  norms.GroupNorm,
  blocks.MaxPool,
  blocks.GlobalAveragePool,
)

# Primitives whose outputs depend on pixels other than the one at their own position.
WINDOWED = (
  *("conv_general_dilated", "select_and_gather_add", "fft", "sort"),
  *("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum"),
  *("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"),
)


@dataclasses.dataclass(frozen=True)
class ReceptiveField:
  """The extent of the input pixels that one position of a feature map sees, (height, width).

  >>> ReceptiveField().after_window((3, 3), (2, 2)).after_window((3, 3), (1, 1))
  ReceptiveField(size=(7, 7), jump=(2, 2))

  Attributes:
    size: extent in pixels.
    jump: distance in pixels between the receptive fields of neighboring positions.
  """

  size: tuple[int, int] = (1, 1)
  jump: tuple[int, int] = (1, 1)

  def after_window(self, window: tuple[int, int], stride: tuple[int, int]) -> "ReceptiveField":
    """Returns the receptive field after a window operation.

    `window` is the extent of the operation's window in positions, dilation included.
    """
    size = [s + (w - 1) * j for s, w, j in zip(self.size, window, self.jump, strict=True)]
    jump = [j * s for j, s in zip(self.jump, stride, strict=True)]
    return ReceptiveField((size[0], size[1]), (jump[0], jump[1]))


@dataclasses.dataclass(frozen=True)
class Row:
  """One layer. Shapes are (H, W, C); a receptive field of None is the whole image."""

  name: str
  kind: str
  output_shape: tuple[int, ...]
  parameters: int
  multiply_adds: int
  receptive_field: ReceptiveField | None


def get_layer_table(model: nn.Module, image_shape: tuple[int, int, int]) -> list[Row]:
  """Returns the rows of `model` in execution order for images of shape (H, W, C).

  The function traces the model with abstract values and computes nothing. It marks the input and
  output of each layer in the trace and follows receptive fields from mark to mark, so it need not
  know the operations between layers (ReLU, padding, sums). A module outside LEAVES that has
  parameters of its own, such as a scale, has a row, too: with these, without multiply-adds.

  Raises:
    ValueError: an operation outside the layers of LEAVES looks at several pixels at once. Some
      that only move pixels are not noticed: shifts by padding and slicing, flips and gathers.
  """
  modules: list[nn.Module] = []
  rows: list[Row] = []
  depth = 0  # of layers: the modules within one are parts of its row

  def mark(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    nonlocal depth
    module = context.module
    if context.method_name != "__call__" or depth:
      return next_fun(*args, **kwargs)
    if isinstance(module, LEAVES):
      depth += 1
      y = next_fun(checkpoint_name(args[0], f"{READ}{len(modules)}"), *args[1:], **kwargs)
      depth -= 1
    else:
      y = next_fun(*args, **kwargs)
      if not _get_own_parameters(module):
        return y
    rows.append(_create_row(module, args, y))
    modules.append(module)
    return checkpoint_name(y, f"{WROTE}{len(rows) - 1}")

  def forward(images: jax.Array) -> Any:
    return model.init_with_output(jax.random.key(0), images, train=False)

  with nn.intercept_methods(mark):
    trace = jax.make_jaxpr(forward)(jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
  fields = _follow_receptive_fields(trace.jaxpr, modules)
  return [
    dataclasses.replace(row, receptive_field=field) for row, field in zip(rows, fields, strict=True)
  ]


def get_receptive_field(rows: Sequence[Row]) -> tuple[int, int] | None:
  """Returns the receptive field of the last layer before the global pool or the dense layers.

  It is (height, width) in pixels. None is the whole image, which a network without convolutions
  sees, and the positions of a feature map where an earlier layer pools the whole image, as
  squeeze-excite does.
  """
  if any(not row.receptive_field and math.prod(row.output_shape[:-1]) > 1 for row in rows):
    return None
  sizes = [row.receptive_field.size for row in rows if row.receptive_field]
  return sizes[-1] if sizes else None


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
  """The sums `parameters` and `multiply_adds` of a layer table, and its `receptive_field`."""
  return {
    "parameters": sum(row.parameters for row in rows),
    "multiply_adds": sum(row.multiply_adds for row in rows),
    "receptive_field": get_receptive_field(rows),
  }


def _follow_receptive_fields(
  jaxpr: Any, modules: Sequence[nn.Module]
) -> list[ReceptiveField | None]:
  """Returns the receptive field of each module's output, which is 0 if it sees no pixel.

  The images are the only input of `jaxpr`.
  """
  # Holds only variables that depend on the images.
  known: dict[Any, ReceptiveField | None] = {jaxpr.invars[0]: ReceptiveField()}
  written: dict[int, ReceptiveField | None] = {}
  read: dict[int, ReceptiveField | None] = {}  # by the layer whose equations come next
  for equation in jaxpr.eqns:
    inputs = [known[v] for v in equation.invars if not hasattr(v, "val") and v in known]
    if not inputs:
      continue
    field = _join_receptive_fields(inputs)
    name = equation.params.get("name", "") if equation.primitive.name == "name" else ""
    if name.startswith(READ):
      read[int(name.removeprefix(READ))] = field
    elif name.startswith(WROTE):
      number = int(name.removeprefix(WROTE))
      if number in read:
        field = _get_layer_field(modules[number], read.pop(number))
      written[number] = field
    elif not read:  # outside the layers
      field = _get_operation_field(equation, field)
    known |= dict.fromkeys(equation.outvars, field)
  return [written.get(number, ReceptiveField((0, 0))) for number in range(len(modules))]


def _join_receptive_fields(fields: Sequence[ReceptiveField | None]) -> ReceptiveField | None:
  """Returns the receptive field of a function of several positions.

  It is None, the whole image, if one of them is.
  """
  seen = [field for field in fields if field]
  if len(seen) < len(fields):
    return None
  heights, widths = zip(*(field.size for field in seen), strict=True)
  return ReceptiveField((max(heights), max(widths)), seen[0].jump)


def _get_layer_field(module: nn.Module, field: ReceptiveField | None) -> ReceptiveField | None:
  if isinstance(module, blocks.GlobalAveragePool | nn.Dense) or field is None:
    return None
  if isinstance(module, blocks.MaxPool):
    return field.after_window((module.window,) * 2, (module.window,) * 2)
  if isinstance(module, nn.Conv):
    dilation, stride = blocks.get_pair(module.kernel_dilation), blocks.get_pair(module.strides)
    sides = blocks.get_pair(module.kernel_size)
    extent = [(k - 1) * d + 1 for k, d in zip(sides, dilation, strict=True)]
    return field.after_window((extent[0], extent[1]), stride)
  return field


def _get_operation_field(equation: Any, field: ReceptiveField | None) -> ReceptiveField | None:
  """Returns the receptive field after an operation outside the layers, whose inputs see `field`.

  Raises:
    ValueError: the operation looks at several pixels, and its window is not known here.
  """
  for inner in _list_equations(equation):
    shape = inner.invars[0].aval.shape if inner.invars else ()
    strides = inner.params.get("strides") or (1, 1, 1, 1)
    is_strided = len(shape) == 4 and {*strides[1:3]} != {1}
    if inner.primitive.name in WINDOWED or is_strided or _mixes_positions(inner):
      raise ValueError(
        f"the receptive field of {inner.primitive.name!r} on an array {shape} is not known; make "
        "it a module, and add that to LEAVES and _get_layer_field of layer_table.py"
      )
    if len(shape) == 4 and {*inner.params.get("axes", ())} & {1, 2}:  # a reduction
      return None
  return field


def _mixes_positions(equation: Any) -> bool:
  """Whether it multiplies along the height or width of a map, or folds them into other axes."""
  name, shapes = equation.primitive.name, [v.aval.shape for v in equation.invars]
  if name == "dot_general":
    axes, _ = equation.params["dimension_numbers"]
    return any(len(shape) == 4 and {1, 2} & {*own} for shape, own in zip(shapes, axes, strict=True))
  if name != "reshape" or len(shapes[0]) != 4:
    return False
  after = equation.params["new_sizes"]  # two axes are the flattened map that dense layers read
  return len(after) > 2 and after[:3] != shapes[0][:3]


def _list_equations(equation: Any) -> Iterator[Any]:
  """Yields an equation and all equations inside it, such as those of jit or custom_vjp."""
  yield equation
  for value in equation.params.values():
    inner = getattr(value, "jaxpr", value)
    for one in getattr(inner, "eqns", ()):
      yield from _list_equations(one)


def _create_row(module: nn.Module, inputs: Sequence[Any], outputs: Any) -> Row:
  y = jax.tree.leaves(outputs)[0]
  return Row(
    name="/".join(module.path),
    kind=_describe(module),
    output_shape=y.shape[1:],
    parameters=sum(leaf.size for leaf in _get_own_parameters(module)),
    multiply_adds=_count_multiply_adds(module, inputs, y),
    receptive_field=None,
  )


def _get_own_parameters(module: nn.Module) -> list[jax.Array]:
  """The parameters of a layer; of another module those that are in no module within it."""
  parameters = module.variables.get("params", {})
  if isinstance(module, LEAVES):
    return jax.tree.leaves(parameters)
  return [leaf for leaf in parameters.values() if not isinstance(leaf, Mapping)]


def _count_multiply_adds(module: nn.Module, inputs: Sequence[Any], y: jax.Array) -> int:
  if isinstance(module, nn.Dense):
    return inputs[0].shape[-1] * y.shape[-1]
  if not isinstance(module, nn.Conv):
    return 0
  window = math.prod(blocks.get_pair(module.kernel_size))
  return math.prod(y.shape[1:]) * window * (inputs[0].shape[-1] // module.feature_group_count)


def _describe(module: nn.Module) -> str:
  if isinstance(module, nn.Dense):
    return "dense"
  if not isinstance(module, nn.Conv):
    return getattr(module, "kind", type(module).__name__)  # one class may be several norms
  height, width = blocks.get_pair(module.kernel_size)
  dilation = blocks.get_pair(module.kernel_dilation)
  text = f"conv {height}x{width}"
  if dilation != (1, 1):
    text += f" dilation {dilation[0]}"
  if blocks.get_pair(module.strides) != (1, 1):
    text += f" stride {blocks.get_pair(module.strides)[0]}"
  if module.feature_group_count > 1:
    text += f" groups {module.feature_group_count}"
  return text
