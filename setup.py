"""Packaging of ppnet. Tool settings live in pyproject.toml."""

import setuptools

# What the package imports at run time. Lower bounds are the oldest versions
# the code is meant for; there are no upper bounds, so that ppnet installs
# beside whatever else an environment holds.
_INSTALL_REQUIRES = [
  "Pillow>=10.3",
  "absl-py>=2.1",
  "array_record>=0.8",
  "dp-accounting>=0.6",
  "flax>=0.12",
  "grain>=0.2.12",
  "jax>=0.10",
  "jax-privacy>=2.0",
  "jaxtyping>=0.3",
  "matplotlib>=3.9",
  "ml_collections>=1.0",
  "msgpack>=1.0",
  "numpy>=2.0",
  "optax>=0.2.8",
  "orbax-checkpoint>=0.11.30",
  "safetensors>=0.8",
  "scikit-learn>=1.5",
  "scipy>=1.14",
  "sentencepiece>=0.2",
  "soundfile>=0.12",
  "soxr>=0.5",
  "tensorboardX>=2.6",
  "tqdm>=4.66",
]

_EXTRAS_REQUIRE = {
  # Linters and type checkers are pinned: a new release may add a rule, and a
  # change nobody made must not turn the checks red.
  "test": [
    "beartype>=0.20",
    "chex>=0.1.90",
    "hypothesis>=6.130",
    "import-linter==2.16",
    "pyarrow>=15",
    "pyrefly==1.4.1",
    "pytest-xdist>=3.6",
    "pytest>=8.3",
    "ruff==0.17.5",
    "tensorflow-datasets>=4.9.7",
  ],
  # Other libraries, for comparison: benchmarks and tests marked `peers`. torch
  # is pinned to one release because PyPI's wheels for Linux bring the CUDA
  # libraries and PyTorch's own index has the same release without:
  #   pip install -e '.[test,peers]' \
  #     --extra-index-url https://download.pytorch.org/whl/cpu
  # Where pip sees both it takes 2.13.0+cpu, the later version of the two. A pin
  # of 2.13.0+cpu itself could not be met on a Mac.
  "peers": [
    "jax-privacy>=2.0",
    "kymatio>=0.3",
    "librosa>=0.11",
    "opacus>=1.6",
    "peft>=0.21",
    "torch==2.13.0",
    "transformers>=5.0",
  ],
  # What PREPARE needs for some sources. Parquet tables take pyarrow. A TFDS set
  # is *built* with TensorFlow and read without; training imports neither.
  "prepare": [
    "pyarrow>=15",
    "tensorflow-datasets>=4.9.7",
    "tensorflow>=2.18",
  ],
  "tpu": ["jax[tpu]"],
  "cuda": ["jax[cuda13]"],
}

setuptools.setup(
  name="ppnet",
  version="0.1.0",
  description=(
    "Multimodal Llama models trained on private data with a differential"
    " privacy guarantee, in JAX"
  ),
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["ppnet", "ppnet.*"]),
  # Said although it is the default: an editable install then puts this folder
  # on the path, where a test runner or a type checker finds the same files
  # under the same names.
  package_dir={"": "."},
  install_requires=_INSTALL_REQUIRES,
  extras_require=_EXTRAS_REQUIRE,
)
