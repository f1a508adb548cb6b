"""The data sets that can be downloaded and prepared, by the names that TFDS has for them.

URLs and checksums are those of TFDS, except for CIFAR-10, which has faster mirrors.
"""

from pathlib import Path

from flax_cifar.data.sources import cifar_archive, idx, published, svhn

SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"
MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"


def _file(url: str, name: str, size: int, sha256: str) -> published.File:
  return published.File(name, size, "sha256", sha256, urls=(url + name,), own_url="")


CIFAR10 = published.Source(
  name="cifar10",
  title="CIFAR-10",
  version="3.0.2",
  image_size=32,
  place="",
  files=(cifar_archive.CIFAR10_FILE,),
  other_forms=cifar_archive.CIFAR10_FORMS,
  disk_bytes=400_000_000,
  names={"label": cifar_archive.CLASS_NAMES},
  id_digits=5,
  read=cifar_archive.read_archive,
)
CIFAR100 = published.Source(
  name="cifar100",
  title="tfds:cifar100",
  version="3.0.2",
  image_size=32,
  place="",
  files=(cifar_archive.CIFAR100_FILE,),
  other_forms=cifar_archive.CIFAR100_FORMS,
  disk_bytes=400_000_000,
  names={"label": cifar_archive.FINE_NAMES, "coarse_label": cifar_archive.COARSE_NAMES},
  id_digits=5,
  read=cifar_archive.read_archive,
)
MNIST = published.Source(
  name="mnist",
  title="tfds:mnist",
  version="3.0.1",
  image_size=28,
  place="downloads/mnist",  # two data sets have files of these names
  files=(
    _file(
      MNIST_URL,
      "train-images-idx3-ubyte.gz",
      9_912_422,
      "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    _file(
      MNIST_URL,
      "train-labels-idx1-ubyte.gz",
      28_881,
      "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    _file(
      MNIST_URL,
      "t10k-images-idx3-ubyte.gz",
      1_648_877,
      "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    _file(
      MNIST_URL,
      "t10k-labels-idx1-ubyte.gz",
      4_542,
      "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
  ),
  other_forms=(),
  disk_bytes=100_000_000,
  names={},
  id_digits=0,
  read=idx.read_splits,
)
FASHION_MNIST = published.Source(
  name="fashion_mnist",
  title="tfds:fashion_mnist",
  version="3.0.1",
  image_size=28,
  place="downloads/fashion_mnist",
  files=(
    _file(
      FASHION_MNIST_URL,
      "train-images-idx3-ubyte.gz",
      26_421_880,
      "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    ),
    _file(
      FASHION_MNIST_URL,
      "train-labels-idx1-ubyte.gz",
      29_515,
      "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    ),
    _file(
      FASHION_MNIST_URL,
      "t10k-images-idx3-ubyte.gz",
      4_422_102,
      "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    ),
    _file(
      FASHION_MNIST_URL,
      "t10k-labels-idx1-ubyte.gz",
      5_148,
      "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
  ),
  other_forms=(),
  disk_bytes=150_000_000,
  names={},
  id_digits=0,
  read=idx.read_splits,
)
SVHN = published.Source(
  name="svhn_cropped",
  title="tfds:svhn_cropped",
  version="3.1.0",
  image_size=32,
  place="downloads/svhn_cropped",
  files=(
    _file(
      SVHN_URL,
      "train_32x32.mat",
      182_040_794,
      "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
    ),
    _file(
      SVHN_URL,
      "test_32x32.mat",
      64_275_384,
      "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
    ),
  ),
  other_forms=(),
  disk_bytes=800_000_000,
  names={},
  id_digits=6,
  read=svhn.read_splits,
)
CATALOG = {source.name: source for source in (CIFAR10, CIFAR100, MNIST, FASHION_MNIST, SVHN)}


def advise(name: str, root: Path) -> str:
  """What to do if a data set `name`, or NAME/CONFIG, of no catalog is not prepared in `root`."""
  return (
    f"prepare it with tfds.load({name!r}, data_dir={str(root)!r}), which may need TensorFlow, or "
    "name its place in data.dir"
  )
