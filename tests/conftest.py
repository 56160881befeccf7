"""Every test sees eight CPU devices, and every slip with keys is an error.

The device count must be set before JAX starts a backend, so it is set here, at
import, for all tests: one process runs them all, sharded or not.

Environment:
  PPNET_TEST_PLATFORMS: JAX platforms, for tests marked `tpu` or `gpu`; default
    "cpu". JAX_PLATFORMS is not read: on a machine with an accelerator it is
    often set for good, and the default tests would silently move there.
"""

import os
import shutil
import tempfile


def _limit_threads() -> None:
  """Gives each pytest-xdist worker its share of the cores.

  XLA, OpenBLAS and OpenMP each start one thread per core unless told; with one
  worker per core the threads would spend their time displacing each other.
  """
  workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
  if workers == 1:
    return
  threads = str(max(1, (os.cpu_count() or 1) // workers))
  for name in ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, threads)  # XLA's CPU client reads NPROC.
  os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_cpu_multi_thread_eigen=false"]
  ).strip()


# Many tests train the same tiny model, some in processes of their own: it is
# compiled once per session, by whichever comes first. Made anew each time, so
# that no program of an earlier version can hide.
_IS_CONTROLLER = "PYTEST_XDIST_WORKER" not in os.environ
if _IS_CONTROLLER:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(
    prefix="ppnet-tests-"
  )
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


def pytest_unconfigure():
  """Removes the compiled programs when the last process is done."""
  if _IS_CONTROLLER:
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


_limit_threads()  # Before the imports below: libraries read it on loading.
os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis  # noqa: E402
import jax  # noqa: E402

jax.config.update(
  "jax_platforms", os.environ.get("PPNET_TEST_PLATFORMS", "cpu")
)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_legacy_prng_key", "error")
jax.config.update("jax_debug_key_reuse", True)

hypothesis.settings.register_profile(
  "ppnet",
  derandomize=True,  # A red run must be red again.
  deadline=None,  # The first example compiles.
  max_examples=20,
)
hypothesis.settings.load_profile("ppnet")
