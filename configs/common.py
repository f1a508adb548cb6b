"""Every key of a run with its default and unit. Each config file starts from it.

The returned ConfigDict is locked: setting a key that it lacks raises an error that names the key.
Durations are in epochs; probabilities and fractions are in [0, 1].
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict(
    {
      "name": "",  # used in the banner and for the default workdir
      "seed": 0,  # of initialization, data order, augmentation, mixing and dropout
      # The seeds seed, seed + 1, ... train at once; results have mean and standard deviation.
      # Made for accelerators: on a CPU, one run after another is faster.
      "num_seeds": 1,  # more than 1 needs augment.backend=device
      "batch_size": 128,  # images per step, over all devices
      "eval_batch_size": 512,  # images per evaluation step, over all devices
      "total_epochs": 10,
      # Of convolutions: float32 | bfloat16 | auto (bfloat16 where the device is fast at it);
      # parameters stay float32.
      "compute_dtype": "float32",
      "num_devices": 0,  # devices to use, of all processes; 0 means all of them
      # Steps per call of compiled code. 0 means 1 on a CPU or with albumentations, else an epoch.
      "steps_per_call": 0,
      # "honest": validation images are held out of training; test is read once, at the end.
      # "published": trains on all of train and validates on test, as the sources did.
      # "trial": like honest, but never reads the test split: for choosing among recipes.
      "protocol": "honest",
      "data": {
        # cifar10 | shapes | tfds:NAME | npz:PATH | folder:PATH. CIFAR-10 and tfds:cifar100, mnist,
        # fashion_mnist and svhn_cropped are downloaded if need be.
        "name": "cifar10",
        # Where CIFAR-10 and tfds:NAME are; "" means TFDS_DATA_DIR, else ~/tensorflow_datasets.
        "dir": "",
        "image_size": 32,  # pixels; images of `shapes` and folders get this size
        "validation_size": 5000,  # images held out of train, unless published
        "limit": 0,  # images used of each split, always the same ones; 0 means all
      },
      "model": {
        # dilated | pyramid | keras_base | keras_fcn | five_convs | ghost | skip | skip_dilated |
        # sprint | sprint_wide | tiny50k | tiny100k | tiny200k | tiny700k | wide
        "name": "dilated",
        "norm": "batch",  # batch | layer | group | ghost | none
        "dropout_rate": 0.05,
        # torch (which most sources used) | keras (Glorot uniform) | flax (LeCun normal) | he (for
        # norm none)
        "init": "torch",
        # Of the residual units of tiny50k, tiny100k, tiny200k and tiny700k. activation: relu | gelu
        # | silu | glu (gated). squeeze_excite: hidden channels as a fraction of all; 0 for none.
        # drop_path: probability that training skips the last unit for an image, in [0, 1); that of
        # the others grows from 0 (stochastic depth).
        "residual": {"activation": "relu", "squeeze_excite": 0.0, "drop_path": 0.0},
      },
      # Arguments of each norm; model.norm selects one.
      "norm": {
        # train_scale False keeps the scale at 1.
        "batch": {"momentum": 0.9, "epsilon": 1e-5, "train_scale": True},
        # num_splits 0: each device has its own statistics.
        "ghost": {"num_splits": 2, "momentum": 0.9, "epsilon": 1e-5, "train_scale": True},
        "layer": {"epsilon": 1e-5, "affine": True},  # affine False: no scale and bias
        "group": {"num_groups": 2, "epsilon": 1e-5},
        "none": {},
      },
      "loss": {
        "label_smoothing": 0.0,
        # Learns from a trained network too: a weights file, the folder of a run, the name of a
        # network of the package or hf:USER/NAME; "" from none. `weight` is that of its part of the
        # loss, in (0, 1].
        "distillation": {"teacher": "", "weight": 0.5, "temperature": 4.0},
      },
      "optimizer": {
        "name": "sgd",  # sgd | adamw | muon
        "learning_rate": 0.01,  # the peak, which the schedule multiplies
        "weight_decay": 0.0,  # sgd: added to the gradient, as in PyTorch; others: decoupled
        "decay_all": True,  # False exempts biases and norm parameters
        "sgd": {"momentum": 0.9, "nesterov": False},
        "adamw": {"b1": 0.9, "b2": 0.999, "epsilon": 1e-8},
        # For dense kernels; `rms` is the root mean square of an update. NAdam updates the rest.
        "muon": {"momentum": 0.95, "rms": 0.2},
      },
      "ema": {"decay": 0.0},  # per step, of parameters and batch statistics; 0 switches it off
      # Arguments of each schedule; schedule.name selects one.
      "schedule": {
        "name": "constant",  # constant | step | exponential | cosine | one_cycle | plateau
        "constant": {},
        "step": {"factor": 0.1, "every": 6.0},  # times `factor` every `every` epochs
        # From the peak to `final` of it, by the same factor at each step; it may also rise.
        "exponential": {"final": 0.01},
        "cosine": {"warmup": 0.0, "final": 0.0},  # epochs of linear warm-up; final fraction of peak
        # Triangle: from `initial` of the peak to 1 at `peak_at` of the run, then down to `final`.
        "one_cycle": {"initial": 0.0, "peak_at": 0.2, "final": 0.0},
        # PyTorch's ReduceLROnPlateau on the validation loss; `patience` is the number of epochs
        # without improvement that are tolerated.
        "plateau": {"factor": 0.1, "patience": 10, "threshold": 1e-4, "cooldown": 0, "final": 0.0},
      },
      "augment": {
        # device (inside the train step) | albumentations (on the host)
        "backend": "device",
        "workers": 0,  # processes for albumentations; 0 is one background thread
        "ops": (),  # of the names below, in order
        # `border` says how pixels outside the image are filled: "reflect" or "fill". `fill` is
        # "mean" (the mean that normalization subtracts, truncated to integers in 0..255), "black",
        # or a value per channel in 0..255 such as "125,30,200". `interpolation` is "bilinear" (the
        # default of Albumentations) or "nearest" (the default of torchvision).
        "horizontal_flip": {"p": 0.5},
        "alternating_flip": {},  # a random side in the first epoch; then the sides alternate
        # `shift` in fractions of the image, `scale` in fractions of the scale, `rotate` in degrees.
        "shift_scale_rotate": {
          "shift": 0.09,
          "scale": 0.09,
          "rotate": 6.0,
          "interpolation": "bilinear",
          "border": "reflect",
          "fill": "black",
          "p": 0.5,
        },
        "rotate": {
          "limit": 6.0,  # degrees
          "interpolation": "bilinear",
          "border": "reflect",
          "fill": "black",
          "p": 0.5,
        },
        # `padding` pixels are added on each side before the crop to the original size.
        "random_crop": {"padding": 4, "border": "reflect", "fill": "black"},
        # Sizes in pixels.
        "coarse_dropout": {"holes": 1, "height": 16, "width": 16, "fill": "mean", "p": 0.5},
        # Factors are drawn from 1 - value to 1 + value; the hue turns by at most this fraction.
        "color_jitter": {
          "brightness": 0.2,
          "contrast": 0.2,
          "saturation": 0.2,
          "hue": 0.05,
          "p": 0.5,
        },
        # One change per image out of shifts, shears, rotation, brightness, contrast, saturation,
        # posterizing and solarizing, by up to `strength` of TrivialAugment's "wide" ranges.
        "trivial_augment": {
          "strength": 1.0,
          "interpolation": "nearest",
          "border": "fill",
          "fill": "mean",
          "p": 1.0,
        },
        # Normalization comes last, in training and evaluation. One value in [0, 1] per channel;
        # () means those of the data set.
        "mean": (),
        "std": (),
      },
      # Arguments of each way to mix the examples of a batch; mixing.name selects one.
      "mixing": {
        "name": "none",  # none | mixup | cutmix | ricap
        "mixup": {"alpha": 0.2},  # of the Beta distribution of an example's weight
        "cutmix": {"alpha": 1.0},  # of the Beta distribution of an example's share of the area
        "ricap": {"alpha": 0.3},  # of the Beta distribution of where the borders are
      },
      # Save policy: after so many epochs, steps or minutes, whichever comes first; 0 switches steps
      # or minutes off. The latest `keep` checkpoints stay, and the best one by validation accuracy.
      "checkpoint": {"every": 1, "every_steps": 0, "every_minutes": 0.0, "keep": 2},
      # screen False prints nothing but warnings. tracker: none | wandb | trackio, which you install
      # yourself.
      "log": {"screen": True, "tensorboard": True, "pictures": True, "tracker": "none"},
    },
    convert_dict=True,
  )
  return config.lock()
