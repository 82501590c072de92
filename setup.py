"""Package metadata. `pip install -e .` is all an install does."""

import setuptools

# The lower bound of a range is the oldest release the test suite ran on (with
# Python 3.11); the upper bound is the first one nobody has tried. The suite
# also ran on Python 3.12, where pip picks the newest jax of the range.
REQUIREMENTS = [
  "absl-py>=2.5,<3",
  "array-record>=0.8.6,<0.9",
  "flax>=0.12.8,<0.13",
  "grain>=0.2.18,<0.3",
  "importlib-resources>=6",  # tensorflow-datasets needs it, does not ask
  "jax>=0.10.2,<0.13",
  "matplotlib>=3.10,<4",
  "ml-collections>=1.1,<2",
  "numpy>=2.4,<3",
  "opencv-python-headless>=5.0.0.93,<6",
  "optax>=0.2.8,<0.3",
  "orbax-checkpoint>=0.12.8,<1",
  "pillow>=12",
  "resvg-py>=0.5,<0.6",
  "safetensors>=0.8,<1",
  "sentencepiece>=0.2.3,<0.3",
  "tensorboardX>=2.6.5,<3",
  "tensorflow-datasets>=4.9.10,<5",  # runs without tensorflow
  "tokenizers>=0.23,<1",
  "tqdm>=4.70,<5",
]

setuptools.setup(
  name="glscl_jax",
  version="0.1.0",
  description="Vision-language pre-training by global and local semantic "
  "completion, in JAX and Flax",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["glscl_jax", "glscl_jax.*"]),
  install_requires=REQUIREMENTS,
  extras_require={
    "test": ["pytest>=9,<10", "pytest-xdist>=3.8,<4", "ruff==0.17.5"],
    "wandb": ["wandb>=0.18"],
    "gpu": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    "tpu-aot": ["jax[tpu]"],  # libtpu compiles without a TPU: launch/compile.py
  },
)
