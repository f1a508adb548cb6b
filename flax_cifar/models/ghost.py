"""Network D, `ghost`: ReLU before ghost batch norm, 1x1 convolutions that pad; 657,146 parameters.

Source: hardayaleva5/EVA5_Phase1_Assignment, Session_7.
"""

from functools import partial

import flax.linen as nn
import jax

from flax_cifar.errors import require
from flax_cifar.models.blocks import ConvUnit, MaxPool, Network
from flax_cifar.models.norms import NoNorm


class Ghost(Network):
  """Three blocks that end in a pool, two units without norm, the head; receptive field 80 pixels.

  Every convolution has a bias and pads by 1 on all sides unless it says otherwise, so 1x1, 3x1
  and 1x3 kernels enlarge the map. The first unit has no dropout.
  """

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    unit = self.get_unit(ConvUnit, order="conv_relu_norm", use_bias=True)
    first = partial(unit, dropout_rate=0.0)
    bare = partial(first, norm=NoNorm)

    x = first(32, name="c1")(images, train)
    x = MaxPool(2, name="pool1")(unit(32, name="c2")(x, train))
    x = unit(16, kernel_size=1, name="c3")(x, train)
    x = unit(64, kernel_size=(3, 1), name="c4")(x, train)
    x = unit(64, kernel_size=(1, 3), name="c5")(x, train)
    x = MaxPool(2, name="pool2")(x)
    x = unit(32, kernel_size=1, name="c6")(x, train)
    x = unit(128, dilation=2, padding=2, name="c7")(x, train)
    x = unit(128, dilation=2, name="c8")(x, train)
    x = MaxPool(2, name="pool3")(x)
    x = bare(256, name="c9")(x, train)
    x = bare(64, name="c10")(x, train)
    x = keep_whole_windows(x, 4)
    return self.get_head(use_bias=True)(x)


def keep_whole_windows(x: jax.Array, window: int) -> jax.Array:
  """The part of (N, H, W, C) `x` that an average pool without padding sees.

  The source pools its 5x5 map by 4, which is the mean of the top left 4x4 positions. Maps of
  larger images hold more windows; the head takes the mean over all of them.

  Raises:
    UserError: the map is smaller than one window.
  """
  height, width = x.shape[1:3]
  enough = min(height, width) >= window
  require(enough, "data.image_size", (height, width), f"large enough for a last map of {window}")
  return x[:, : height - height % window, : width - width % window]
