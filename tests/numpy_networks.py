"""The published networks and one training step of them, written in float64 NumPy.

Each operation returns an `Array`, which knows how to pass a gradient on to its inputs. Nothing here
uses JAX, so that it can judge what JAX and XLA compute.
"""

from functools import partial

import numpy as np

EPSILON, MOMENTUM = 1e-5, 0.9


class Array:
  """Values in float64, with the inputs that they were computed from.

  `inputs` are pairs of an Array and a function from the gradient of the values to its part in the
  gradient of that Array.
  """

  def __init__(self, value, inputs=()):
    self.value = np.asarray(value, np.float64)
    self.inputs = inputs
    self.gradient = None

  def __add__(self, other):
    return Array(self.value + other.value, [(self, lambda g: g), (other, lambda g: g)])


def backpropagate(result, gradient):
  """Sets the gradient of every Array that `result` was computed from."""
  order, seen = [], set()

  def visit(array):
    if id(array) not in seen:
      seen.add(id(array))
      for source, _ in array.inputs:
        visit(source)
      order.append(array)

  visit(result)
  result.gradient = gradient
  for array in reversed(order):
    for source, pass_on in array.inputs:
      part = pass_on(array.gradient)
      source.gradient = part if source.gradient is None else source.gradient + part
    if array.inputs:  # its memory is not needed any more
      array.gradient = array.inputs = None


# ---- Operations


def relu(x):
  return Array(np.maximum(x.value, 0), [(x, lambda g: g * (x.value > 0))])


def reshape(x, shape):
  return Array(x.value.reshape(shape), [(x, lambda g: g.reshape(x.value.shape))])


def take(x, index):
  """x[index], of slices."""

  def pass_on(g):
    total = np.zeros(x.value.shape)
    total[index] = g
    return total

  return Array(x.value[index], [(x, pass_on)])


def interleave(first, second):
  """The channels of both in turn."""
  y = np.empty((*first.value.shape[:3], 2 * first.value.shape[3]))
  y[..., 0::2], y[..., 1::2] = first.value, second.value
  return Array(y, [(first, lambda g: g[..., 0::2]), (second, lambda g: g[..., 1::2])])


def average_positions(x):
  """(N, H, W, C) -> (N, 1, 1, C)."""
  n, h, w, c = x.value.shape
  mean = x.value.mean((1, 2), keepdims=True)
  return Array(mean, [(x, lambda g: np.broadcast_to(g / (h * w), (n, h, w, c)))])


def halve(x):
  """Max pooling in windows of 2 x 2; of equal values the first gets the gradient."""
  n, h, w, c = x.value.shape
  inside = x.value[:, : h // 2 * 2, : w // 2 * 2]
  windows = (
    inside.reshape(n, h // 2, 2, w // 2, 2, c).swapaxes(2, 3).reshape(n, h // 2, w // 2, 4, c)
  )
  largest = windows.argmax(3)

  def pass_on(g):
    spread = (np.arange(4)[:, None] == largest[:, :, :, None]) * g[:, :, :, None]
    total = np.zeros(x.value.shape)
    total[:, : h // 2 * 2, : w // 2 * 2] = (
      spread.reshape(n, h // 2, w // 2, 2, 2, c).swapaxes(2, 3).reshape(inside.shape)
    )
    return total

  return Array(windows.max(3), [(x, pass_on)])


def pad(x, padding, mode):
  """Pads height and width by `padding`, with zeros or reflected pixels."""
  rows, columns = (padding, padding) if isinstance(padding, int) else padding
  widths = ((0, 0), (rows, rows), (columns, columns), (0, 0))
  h, w = x.value.shape[1:3]

  def pass_on(g):
    if mode == "constant":
      return g[:, rows : rows + h, columns : columns + w]
    total = np.zeros((len(g), h, *g.shape[2:]))
    np.add.at(total, (slice(None), np.pad(np.arange(h), rows, mode)), g)
    result = np.zeros(x.value.shape)
    np.add.at(result, (slice(None), slice(None), np.pad(np.arange(w), columns, mode)), total)
    return result

  return Array(np.pad(x.value, widths, mode), [(x, pass_on)])


def convolve(x, kernel, *, padding=0, dilation=1, stride=1, mode="constant"):
  """Cross-correlation of NHWC and HWIO; there are C / I groups of channels."""
  padded = pad(x, padding, mode)
  height = padded.value.shape[1] - (kernel.value.shape[0] - 1) * dilation
  width = padded.value.shape[2] - (kernel.value.shape[1] - 1) * dilation
  depthwise = kernel.value.shape[2] == 1
  assert depthwise or kernel.value.shape[2] == x.value.shape[3]
  indices = {
    (i, j): (
      slice(None),
      slice(i * dilation, i * dilation + height, stride),
      slice(j * dilation, j * dilation + width, stride),
    )
    for i, j in np.ndindex(kernel.value.shape[:2])
  }

  def multiply(array, weights):
    """One large product: NumPy would make one for each row of each image."""
    if depthwise:
      return array * weights[0]
    return (array.reshape(-1, len(weights)) @ weights).reshape(*array.shape[:3], -1)

  def to_input(g):
    total = np.zeros(padded.value.shape)
    for tap, index in indices.items():
      weights = kernel.value[tap]
      total[index] += multiply(g, weights if depthwise else weights.T)
    return total

  def to_kernel(g):
    total = np.empty(kernel.value.shape)
    flat = g.reshape(-1, g.shape[-1])
    for tap, index in indices.items():
      part = padded.value[index].reshape(len(flat), -1)
      total[tap] = (part * flat).sum(0) if depthwise else part.T @ flat
    return total

  y = 0.0
  for tap, index in indices.items():
    y += multiply(padded.value[index], kernel.value[tap])
  return Array(y, [(padded, to_input), (kernel, to_kernel)])


def multiply_matrix(x, kernel):
  to_x, to_kernel = (lambda g: g @ kernel.value.T), (lambda g: x.value.T @ g)
  return Array(x.value @ kernel.value, [(x, to_x), (kernel, to_kernel)])


def add_per_channel(x, bias):
  axes = tuple(range(x.value.ndim - 1))
  return Array(x.value + bias.value, [(x, lambda g: g), (bias, lambda g: g.sum(axes))])


def multiply_per_channel(x, scale):
  axes = tuple(range(x.value.ndim - 1))
  inputs = [(x, lambda g: g * scale.value), (scale, lambda g: (g * x.value).sum(axes))]
  return Array(x.value * scale.value, inputs)


def standardize(x, parts):
  """(x - mean) / sd of each of the interleaved parts of a batch, and mean and unbiased variance."""
  sets = x.value.reshape(-1, parts, *x.value.shape[1:])
  axes, count = (0, 2, 3), sets[:, 0, ..., 0].size
  mean, var = sets.mean(axes, keepdims=True), sets.var(axes, keepdims=True)
  inverse = 1 / np.sqrt(var + EPSILON)
  v = (sets - mean) * inverse

  def pass_on(g):
    g = g.reshape(sets.shape)
    projections = g.mean(axes, keepdims=True) + v * (g * v).mean(axes, keepdims=True)
    return (inverse * (g - projections)).reshape(x.value.shape)

  moments = mean.mean(1).ravel(), var.mean(1).ravel() * count / (count - 1)
  return Array(v.reshape(x.value.shape), [(x, pass_on)]), moments


# ---- Units


class Network:
  """The units of a network; the path of a module selects its variables.

  Args:
    variables: nested dictionaries of arrays.
    parts: ghost batches in training; 0 evaluates with the running statistics.
  """

  def __init__(self, variables, parts=0):
    self.params = _map(Array, variables["params"])
    self.batch_stats = _map(np.float64, variables.get("batch_stats", {}))
    self.parts = parts

  def conv(self, x, path, **options):
    conv = _get(self.params, path)
    y = convolve(x, conv["kernel"], **options)
    return add_per_channel(y, conv["bias"]) if "bias" in conv else y

  def whiten(self, x, path):
    """A convolution whose kernel gets no gradient, its bias, and ReLU."""
    conv = _get(self.params, path)
    conv["fixed_kernel"].gradient = np.zeros_like(conv["fixed_kernel"].value)
    y = convolve(x, Array(conv["fixed_kernel"].value))
    return relu(add_per_channel(y, conv["bias"]))

  def dense(self, x, path):
    dense = _get(self.params, path)
    return add_per_channel(multiply_matrix(x, dense["kernel"]), dense["bias"])

  def finish(self, x, path):
    """The norm of the unit at `path`, if it has one, and ReLU."""
    return relu(self.normalize(x, f"{path}/norm") if "norm" in _get(self.params, path) else x)

  def normalize(self, x, path):
    """The norm at `path`; training updates its running statistics."""
    norm, stats = _get(self.params, path), _get(self.batch_stats, path)
    if self.parts:
      x, moments = standardize(x, self.parts)
      for name, moment in zip(("mean", "var"), moments, strict=True):
        stats[name] = MOMENTUM * stats[name] + (1 - MOMENTUM) * moment
    else:
      x = Array((x.value - stats["mean"]) / np.sqrt(stats["var"] + EPSILON))
    return add_per_channel(multiply_per_channel(x, norm["scale"]), norm["bias"])

  def unit(self, x, path, **options):
    return self.finish(self.conv(x, f"{path}/conv", **options), path)

  def relu_first(self, x, path, *, padding=1, **options):
    x = relu(self.conv(x, f"{path}/conv", padding=padding, **options))
    return self.normalize(x, f"{path}/norm")

  def separable(self, x, path):
    x = self.conv(x, f"{path}/depthwise", padding=1)
    return self.finish(self.conv(x, f"{path}/pointwise"), path)

  def residual(self, x, path, *, stride=1):
    """What a residual unit adds to its input."""
    x = self.conv(x, f"{path}/depthwise", padding=1, stride=stride)
    x = self.conv(self.normalize(x, f"{path}/depthwise_norm"), f"{path}/pointwise")
    return self.finish(x, path)

  def spatial(self, x, path):
    x = self.conv(x, f"{path}/vertical", padding=(1, 0))
    return self.finish(self.conv(x, f"{path}/horizontal", padding=(0, 1)), path)

  def two_groups(self, x, path, **options):
    """A 3x3 group and one with `options`; their output channels alternate."""
    half = x.value.shape[-1] // 2
    first, second = (take(x, (..., part)) for part in (slice(half), slice(half, None)))
    first = self.conv(first, f"{path}/group1", padding=1)
    second = self.conv(second, f"{path}/group2", padding=2, **options)
    return self.finish(interleave(first, second), path)

  def reflected(self, x, path, dilation, padding):
    return self.unit(x, path, dilation=dilation, padding=padding, mode="reflect")

  def head(self, x):
    logits = self.conv(average_positions(x), "head/conv")
    return reshape(logits, (len(logits.value), -1))


def _get(tree, path):
  for key in path.split("/"):
    tree = tree[key]
  return tree


def _map(function, tree):
  if isinstance(tree, dict):
    return {key: _map(function, value) for key, value in tree.items()}
  return function(tree)


# ---- Networks


def run_dilated(net, x):
  x = net.unit(x, "c1_1", padding=1)
  x = net.separable(x, "c1_2/plain") + net.reflected(x, "c1_2/dilated", 2, 2)
  x = net.unit(x, "c1_3/plain", padding=1) + net.reflected(x, "c1_3/dilated", 4, 4)
  for c in ("c2", "c3", "c4"):
    x = net.unit(x, f"{c}_1/plain") + net.reflected(x, f"{c}_1/dilated", 2, 1)
    x = net.separable(x, f"{c}_2/plain") + net.reflected(x, f"{c}_2/dilated", 4, 4)
    x = net.unit(x, f"{c}_3/plain", padding=1) + net.reflected(x, f"{c}_3/dilated", 8, 8)
  return net.head(x)


def run_pyramid(net, x):
  x = net.unit(net.unit(x, "c1_1", padding=1), "c1_2", padding=1)
  x = halve(net.conv(x, "transition1/conv"))
  x = net.unit(net.unit(net.unit(x, "c2_1", padding=1), "c2_2", padding=1), "c2_3")
  x = halve(net.conv(x, "transition2/conv"))
  x = net.unit(net.unit(net.unit(x, "c3_1", padding=1), "c3_2"), "c3_3")
  return net.head(x)


def run_ghost(net, x):
  x = halve(net.relu_first(net.relu_first(x, "c1"), "c2"))
  x = halve(net.relu_first(net.relu_first(net.relu_first(x, "c3"), "c4"), "c5"))
  x = net.relu_first(net.relu_first(x, "c6"), "c7", dilation=2, padding=2)
  x = halve(net.relu_first(x, "c8", dilation=2))
  x = relu(net.conv(x, "c9/conv", padding=1))
  x = relu(net.conv(x, "c10/conv", padding=1))
  return net.head(take(x, (slice(None), slice(4), slice(4))))


def run_skip(net, x):
  x = net.relu_first(x, "c1")
  x = x + net.relu_first(x, "c2")
  x = net.relu_first(halve(net.conv(x, "transition1/conv")), "c4")
  x = x + net.relu_first(x, "c5")
  x = halve(net.conv(net.relu_first(x, "c6"), "transition2/conv"))
  x = net.relu_first(net.relu_first(net.relu_first(x, "c8"), "c9"), "c10")
  return net.head(x)


def run_skip_dilated(net, x):
  x = net.relu_first(x, "c1")
  x = x + net.relu_first(x, "c2")
  x = net.conv(net.relu_first(x, "c3", stride=2), "transition1/conv")
  x = net.relu_first(x, "c4", dilation=2, padding=2)
  x = x + net.relu_first(x, "c5")
  x = net.conv(net.relu_first(x, "c6", stride=2), "transition2/conv")
  x = net.relu_first(x, "c7")
  x = x + net.relu_first(x, "c8")
  return net.head(net.relu_first(x, "c9", stride=2))


def run_tiny(net, x, units=(3, 4, 5)):
  x = net.unit(x, "stem", padding=1)
  for stage, number in enumerate(units, start=1):
    if stage > 1:
      x = net.residual(x, f"stage{stage}_down", stride=2)
    for i in range(1, number + 1):
      x = x + net.residual(x, f"stage{stage}_unit{i}")
  return net.head(net.normalize(x, "norm"))


def run_wide(net, x):
  return run_groups(net, net.conv(x, "patches"))


def run_sprint(net, x):
  return run_groups(net, net.whiten(x, "whitening"))


def run_groups(net, x):
  for group in ("group1", "group2", "group3"):
    x = halve(net.conv(x, f"{group}_pooled/conv", padding=1))
    x = net.unit(net.finish(x, f"{group}_pooled"), f"{group}_unit", padding=1)
  return net.head(x)


def run_keras_base(net, x):
  x = halve(net.unit(net.unit(x, "c1_1", padding=1), "c1_2"))
  x = halve(net.unit(net.unit(x, "c2_1", padding=1), "c2_2"))
  x = halve(net.unit(net.unit(x, "c3_1", padding=1), "c3_2"))
  x = reshape(x, (len(x.value), 768))
  return net.dense(relu(net.dense(relu(net.dense(x, "dense1")), "dense2")), "head")


def run_keras_fcn(net, x):
  x = net.unit(net.unit(x, "c1_1", padding=1), "c1_2", padding=1)
  x = halve(net.conv(x, "transition1/conv"))
  x = net.unit(net.unit(x, "c2_1", padding=1), "c2_2", padding=1)
  x = halve(net.conv(x, "transition2/conv"))
  return net.head(net.unit(net.unit(x, "c3_1", padding=1), "c3_2", padding=1))


def run_five_convs(net, x):
  x = net.unit(net.unit(x, "normal_1", padding=1), "normal_2", padding=1)
  x = halve(net.conv(x, "normal_transition/conv"))
  x = net.spatial(net.spatial(x, "spatial_1"), "spatial_2")
  x = net.separable(net.separable(x, "depthwise_1"), "depthwise_2")
  x = halve(net.conv(x, "depthwise_transition/conv"))
  x = net.two_groups(net.two_groups(x, "kernel_groups_1"), "kernel_groups_2")
  x = net.two_groups(x, "dilation_groups_1", dilation=2)
  return net.head(net.two_groups(x, "dilation_groups_2", dilation=2))


NETWORKS = {
  "dilated": run_dilated,
  "pyramid": run_pyramid,
  "keras_base": run_keras_base,
  "keras_fcn": run_keras_fcn,
  "five_convs": run_five_convs,
  "ghost": run_ghost,
  "skip": run_skip,
  "skip_dilated": run_skip_dilated,
  "sprint": run_sprint,
  "sprint_wide": run_sprint,
  "tiny50k": run_tiny,
  "tiny100k": run_tiny,
  "tiny200k": partial(run_tiny, units=(3, 4, 6)),
  "tiny700k": partial(run_tiny, units=(3, 4, 6)),
  "wide": run_wide,
}


def evaluate(name, variables, images):
  """The logits (N, classes) of `images`, which are normalized."""
  return NETWORKS[name](Network(variables), Array(images)).value


def train(name, variables, images, targets, parts):
  """The sum of the cross-entropies, the gradients of their mean, and the new running statistics."""
  network = Network(variables, parts)
  logits = NETWORKS[name](network, Array(images))
  shifted = logits.value - logits.value.max(-1, keepdims=True)
  log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  backpropagate(logits, (np.exp(log_p) - targets) / len(targets))
  gradients = _map(lambda param: param.gradient, network.params)
  return -(targets * log_p).sum(), gradients, network.batch_stats
