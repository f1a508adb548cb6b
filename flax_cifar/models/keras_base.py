"""Network C0, `keras_base`: three pairs of convolutions and a dense head; 1,172,410 parameters.

Source: EVA, session 6A, the network before its improvements.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_cifar.errors import require
from flax_cifar.models.blocks import ConvUnit, DType, MaxPool, Network, get_bias_init
from flax_cifar.models.dropout import Dropout
from flax_cifar.models.lowering import relu


class KerasBase(Network):
  """Three blocks of a padded and an unpadded unit, pool and dropout; then three dense layers.

  Every layer has a bias. `dropout_rate` is that after the pools; after the dense layers it is
  twice as high. Receptive field 36 pixels before the dense layers.

  Raises:
    UserError: twice `dropout_rate` is 1 or more.
  """

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    rate = self.dropout_rate
    require(rate < 0.5, "model.dropout_rate", rate, "below 0.5: the dense layers use twice of it")
    unit = self.get_unit(ConvUnit, dropout_rate=0.0, use_bias=True)

    x = images
    for number, features in enumerate((48, 96, 192), start=1):
      x = unit(features, name=f"c{number}_1")(x, train)
      x = unit(features, padding=0, name=f"c{number}_2")(x, train)
      x = MaxPool(2, name=f"pool{number}")(x)
      x = Dropout(rate, name=f"dropout{number}")(x, train)
    x = x.reshape(len(x), -1)
    for number, features in enumerate((512, 256), start=1):
      x = self._dense(x, features, name=f"dense{number}", dtype=self.dtype)
      x = Dropout(2 * rate, name=f"dense{number}_dropout")(relu(x), train)
    return self._dense(x, self.num_classes, name="head", dtype=jnp.float32)

  def _dense(self, x: jax.Array, features: int, *, name: str, dtype: DType) -> jax.Array:
    bias_init = get_bias_init(self.kernel_init, x.shape[-1])
    return nn.Dense(
      features, kernel_init=self.kernel_init, bias_init=bias_init, dtype=dtype, name=name
    )(x)
