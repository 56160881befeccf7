"""What holds for ppnet.data as a whole: its workers never start a device.

Grain imports JAX where it is installed (for its tree functions, and only if it
is there), so "JAX is not loaded" is checked where JAX cannot be imported, and
"no device is started" where it can.
"""

import ast
import pathlib
import subprocess
import sys

import ppnet.data

_ROOT = pathlib.Path(ppnet.data.__path__[0])
_FORBIDDEN = ("flax", "jax", "optax", "ppnet.models", "ppnet.privacy")
_FORBIDDEN += ("ppnet.train", "tensorflow", "torch")

_USE_EVERYTHING = """
import importlib, pathlib, sys
import numpy as np
modules = sys.argv[2].split(",")
for name in modules:
  importlib.import_module(f"ppnet.data.{name}")
from ppnet import config as config_lib
from ppnet.data import pipeline, prepare
config = config_lib.ExperimentConfig()
config.model.decoder.max_seq_len = 64
prepared_dir = pathlib.Path(sys.argv[1])
prepare.prepare(config.data, prepared_dir, progress=False)
dataset = pipeline.examples(config, prepared_dir, split="test")
(step,) = pipeline.train_steps(
  dataset, draw=lambda step: np.arange(5), num_steps=1, microbatch_size=2,
  num_threads=2, prefetch_steps=2,
)
shapes = [batch["audio"].shape for batch in step["microbatches"]]
assert shapes == [(2, 24, 40)] * 3
"""

_WITHOUT_JAX = """
import sys
class Blocker:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in ("jax", "jaxlib", "flax", "tensorflow"):
      raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
"""

_NOTHING_LOADED = """
assert not {"jax", "jaxlib", "flax", "tensorflow"} & set(sys.modules)
print("done")
"""

# JAX refuses to change the number of devices once a backend has started.
_NO_BACKEND = """
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 3)
assert jax.local_device_count() == 3
print("done")
"""


def _modules() -> list[str]:
  return sorted(path.stem for path in _ROOT.glob("*.py"))


def _run(script: str, prepared_dir: pathlib.Path) -> None:
  result = subprocess.run(
    [sys.executable, "-W", "error::ResourceWarning", "-c", script]
    + [str(prepared_dir), ",".join(_modules())],
    capture_output=True,
    text=True,
    cwd=_ROOT.parent.parent,
    timeout=100,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout == "done\n"


def test_room_works_where_jax_is_not_installed(digits_dir):
  _run(_WITHOUT_JAX + _USE_EVERYTHING + _NOTHING_LOADED, digits_dir)
  # Fails if: a module here imports JAX, directly or through another room.


def test_room_starts_no_device_where_jax_is_installed(digits_dir):
  _run(_USE_EVERYTHING + _NO_BACKEND, digits_dir)


def test_text_and_batching_do_not_even_load_grain():
  script = """
import sys
from ppnet.data import batching, text
assert not {"grain", "jax"} & set(sys.modules)
print("done")
"""
  _run(script, pathlib.Path())


def test_no_module_names_a_forbidden_import():
  for path in _ROOT.glob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
      for name in names:
        assert not any(
          name == bad or name.startswith(f"{bad}.") for bad in _FORBIDDEN
        ), f"{path.name} imports {name}"
