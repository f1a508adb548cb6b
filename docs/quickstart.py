# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Network A in pictures
#
# Network A sums plain and dilated convolutions. This notebook looks at its receptive field, its
# kinds of convolution, its augmentation, and at norms. It draws its own images and downloads
# nothing. On two cores it takes a few minutes; [install.md](install.md#colab-kaggle-jupyter) says
# how to run it on Colab and Kaggle.

# %%
import pathlib
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np

import flax_cifar
from flax_cifar import environment, explain
from flax_cifar.data import splits
from flax_cifar.data.augment import device, normalize
from flax_cifar.models import layer_table

environment.apply_settings(restart=False)  # before JAX starts: it keeps what it compiles
plt.rcParams["figure.dpi"] = 60
data = flax_cifar.load_data("shapes")
mean, std = splits.channel_stats(data.train.images)


# %%
def show(images, titles, columns=5):
  """Draws images in a grid."""
  rows = -(-len(images) // columns)
  figure, axes = plt.subplots(rows, columns, figsize=(1.5 * columns, 1.8 * rows), squeeze=False)
  for axis in axes.flat:
    axis.axis("off")
  for axis, image, title in zip(axes.flat, images, titles, strict=False):
    axis.imshow(image, interpolation="nearest")
    axis.set_title(title, fontsize=9)
  figure.tight_layout()
  plt.show()


# %% [markdown]
# ## The data
#
# Ten classes of drawn shapes and textures, in images of 32 x 32 pixels.

# %%
firsts = [int(np.argmax(data.train.labels == label)) for label in range(len(data.class_names))]
show(data.train.images[firsts], data.class_names)

# %% [markdown]
# ## The receptive field, by formula
#
# How many pixels can a position of a feature map see? A plain 3x3 convolution adds two pixels in
# each direction, and one with dilation 8 adds sixteen. Dots are plain convolutions, crosses
# dilated ones.

# %%
model = flax_cifar.create_model("s9")
rows = layer_table.get_layer_table(model, (32, 32, 3))
convolutions = [row for row in rows if "conv" in row.kind and row.receptive_field]

figure, axis = plt.subplots(figsize=(8, 3.5))
for kind, marker in (("plain", "o"), ("dilated", "x")):
  chosen = [
    (number, row.receptive_field.size[0])
    for number, row in enumerate(convolutions)
    if ("dilation" in row.kind) == (kind == "dilated")
  ]
  axis.plot(*zip(*chosen, strict=True), marker, label=kind)
axis.axhline(32, color="gray", linestyle="--", label="the image")
axis.set(xlabel="convolution", ylabel="receptive field (pixels)")
axis.legend()
plt.show()
print("receptive field:", layer_table.get_receptive_field(rows))

# %% [markdown]
# ## The receptive field, by gradient
#
# Not all of these pixels count alike. The gradient at the middle of the last feature map shows how
# much each one does (Luo et al. 2016): before training, and after 51 epochs on CIFAR-10.

# %%
trained = flax_cifar.load_pretrained("s9-full-long")
images = normalize.create_normalize(mean, std, dtype="float32")(data.train.images[:8])
untrained = model.init(jax.random.key(0), images[:1], train=False)

compute_field = jax.jit(explain.compute_effective_receptive_field, static_argnums=0)

figure, axes = plt.subplots(1, 2, figsize=(7, 3.5))
for axis, title, variables in zip(
  axes, ("before training", "trained"), (untrained, trained.weights.variables), strict=True
):
  field = compute_field(model, variables, images)
  axis.imshow(np.sqrt(field), cmap="inferno", vmin=0, vmax=1)  # the root shows the weak outskirts
  axis.set_title(title)
  axis.axis("off")
plt.show()

# %% [markdown]
# ## Depthwise separable against plain
#
# A depthwise separable layer has a 3x3 filter per channel and then a 1x1 convolution. Beside a
# plain 3x3 convolution of the same 32 channels it needs a fraction of the parameters and
# multiply-adds.

# %%
by_name = {row.name: row for row in rows}
parts = {
  "plain 3x3": [by_name["c1_3/plain/conv"]],
  "depthwise\nseparable": [by_name["c1_2/plain/depthwise"], by_name["c1_2/plain/pointwise"]],
}
figure, axes = plt.subplots(1, 2, figsize=(7, 3))
for axis, quantity in zip(axes, ("parameters", "multiply_adds"), strict=True):
  sums = [sum(getattr(row, quantity) for row in layers) for layers in parts.values()]
  axis.bar(list(parts), sums)
  axis.set_title(quantity.replace("_", "-"))
  print(f"{quantity}: {sums[0]:,} against {sums[1]:,}, {sums[0] / sums[1]:.1f} times")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Augmentation
#
# The source flips, shifts, zooms, turns, and cuts a hole. The first column has the images as they
# are, the others are what the network gets in five epochs.

# %%
settings = flax_cifar.create_config("s9:published").augment
augment = device.create_device_augment(
  ops=settings.ops, mean=mean, **{name: settings[name] for name in settings.ops}
)
originals, key = data.train.images[:2], jax.random.key(0)
epochs = [augment(originals, key, np.int32(epoch), np.arange(2)) for epoch in range(5)]
grid = np.stack([originals, *map(np.asarray, epochs)], 1).reshape(-1, 32, 32, 3)
titles = ["original", *(f"epoch {epoch + 1}" for epoch in range(5))]
show(grid, titles * len(originals), columns=6)

# %% [markdown]
# ## Batch, layer and group norm
#
# Network A takes 16 times as many multiply-adds as `pyramid`, the network on which another course
# project compared norms. So this comparison takes `pyramid`: three short runs, one seed each, which
# differ in the norm alone. Each one reads its test images once, at its end.

# %%
folder = pathlib.Path(tempfile.mkdtemp())
runs = {}
for norm in ("batch", "layer", "group"):
  runs[norm] = flax_cifar.train_network(
    f"quickstart:norm={norm}",
    workdir=folder / norm,
    data__limit=4000,
    log__screen=False,
    log__tensorboard=False,
  )

figure, axis = plt.subplots(figsize=(6, 3.5))
for norm, run in runs.items():
  epochs = [record["epoch"] for record in run.records]
  axis.plot(epochs, [100 * record["validation_accuracy"] for record in run.records], label=norm)
  print(f"{norm:6} {run.accuracy:.2%} of the test images")
axis.set(xlabel="epoch", ylabel="validation accuracy (%)", xticks=epochs)
axis.legend()
plt.show()

# %% [markdown]
# One run each says little: repeat them with other seeds, by `seed=1`, before you believe a
# difference. `flax_cifar.tools.sweep` does so with one command.
#
# ## Mistakes
#
# The test images that the network with batch norm gets wrong, titled `predicted / actual`.

# %%
network = runs["batch"].load()
predictions = network.predict(data.test.images).argmax(-1)
wrong = np.flatnonzero(predictions != data.test.labels)
names = network.class_names
print(f"{len(wrong)} of {len(predictions)} test images")
show(
  data.test.images[wrong[:5]],
  [f"{names[predictions[i]]} /\n{names[data.test.labels[i]]}" for i in wrong[:5]],
)

# %% [markdown]
# ## A trained network of the package
#
# `tiny50k` knows the ten classes of CIFAR-10. It has never seen a drawn shape, and has no class
# for one, yet its probabilities sum to one: it has to choose. With CIFAR-10 on your disk,
# `flax_cifar.load_data("cifar10").test.images` has pictures that it knows.

# %%
tiny = flax_cifar.load_pretrained("tiny50k")
pictures = data.test.images[:5]
probabilities = tiny.predict(pictures)
show(
  pictures,
  [f"{tiny.class_names[row.argmax()]}\n{row.max():.0%}" for row in probabilities],
)

# %% [markdown]
# ## Where this was run

# %%
result = runs["batch"].result
print(result["hardware"])
print({name: result["versions"][name] for name in ("python", "jax", "flax")})
