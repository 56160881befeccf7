"""The engines' benchmark: every row is there, right, and never made up."""

import dataclasses
import functools
import importlib.util
import io

import jax
import jax.numpy as jnp
import pytest

from ppnet import config as config_lib
from ppnet import main
from ppnet.bench import engines
from ppnet.core import records
from tests import tiny

PEERS = (
  "jax_privacy.clipped_grad",
  "optax.contrib DP aggregate",
  "PyTorch, non-private",
  "Opacus, hooks",
  "Opacus, ghost",
)


@pytest.fixture(autouse=True)
def _compile_fast(monkeypatch):
  """These tests look at what is written, not at how fast it was."""
  options = {"xla_backend_optimization_level": 0}
  monkeypatch.setattr(
    jax, "jit", functools.partial(jax.jit, compiler_options=options)
  )


def bench_config(**changes):
  config = tiny.experiment()
  config.job = config_lib.Job.BENCHMARK
  config.bench = config_lib.BenchConfig(
    **({"cases": "tiny", "rounds": 2, "peers": False} | changes)
  )
  return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return tmp_path_factory.mktemp("bench")


def test_a_benchmark_leaves_table_record_and_figure(workdir, capsys):
  config = bench_config()
  main.run_job(config, workdir)
  record = records.read_json(workdir / "bench.json")
  rows = record["rows"]
  names = [row["name"] for row in rows]
  # A new engine appears by itself.
  assert names == ["non-private", *(e.name for e in config_lib.Engine)]
  assert rows[0]["time_ratio"] == rows[0]["memory_ratio"] == 1.0
  assert rows[0]["flops_ratio"] == 1.0
  for row in rows:
    assert row["case"] == "tiny"
    assert row["time_ratio"] > 0
    assert row["memory_ratio"] > 0
    assert row["flops_ratio"] >= 1.0
    assert row["sum_error"] < 1e-5
    # AUTO says which of the others it is.
    assert bool(row["note"]) == (row["name"] == "AUTO")
  assert record["is_complete"]
  assert record["machine"]["backend"] == "cpu"
  facts = record["cases"]["tiny"]
  assert facts["batch_size"] == 6
  assert facts["goal"] == {"time_ratio": 1.05, "memory_ratio": 1.10}
  assert len(facts["load_average_before"]) == 3
  printed = capsys.readouterr().out
  for name in names:
    assert name in printed
    assert f"| {name} |" in (workdir / "bench.md").read_text()
  assert (workdir / "figures" / "engines.png").stat().st_size > 10_000


def test_a_finished_case_is_not_measured_again(workdir, monkeypatch):
  """Uses the folder of the test before; a killed run has the same record."""
  monkeypatch.setattr(
    engines, "_measure", lambda *_: pytest.fail("measured again")
  )
  before = (workdir / "bench.json").read_bytes()
  main.run_job(bench_config(), workdir)
  assert (workdir / "bench.json").read_bytes() == before
  with pytest.raises(ValueError, match="bench.rounds"):
    main.run_job(bench_config(rounds=3), workdir)


def test_a_benchmark_goes_on_where_it_was_killed(tmp_path, monkeypatch):
  measured, killed_by = [], ["tiny/mb3"]

  def measure_one(config, workdir, case, log):
    if case.name in killed_by:
      raise KeyboardInterrupt
    measured.append(case.name)
    return [{"case": case.name, "time_ratio": float("inf")}], {}

  monkeypatch.setattr(engines, "_measure", measure_one)
  config = bench_config(cases="tiny,tiny/mb3,tiny/mb2")
  with pytest.raises(KeyboardInterrupt):
    engines.run(config, tmp_path)
  assert not records.read_json(tmp_path / "bench.json")["is_complete"]
  assert measured == ["tiny"]
  killed_by.clear()
  record = engines.run(config, tmp_path)
  assert measured == ["tiny", "tiny/mb3", "tiny/mb2"]  # Each of them once.
  assert list(record["cases"]) == measured
  assert [row["case"] for row in record["rows"]] == measured
  assert record["is_complete"]
  monkeypatch.setattr(engines.measure, "machine", lambda **_: {"cores": 77})
  with pytest.raises(ValueError, match="cores"):
    engines.run(config, tmp_path)


def lineup(case="tiny", *, seed=0):
  case = engines.parse_case(case)
  subject = engines._llama_subject(case, case.shape, seed)
  return engines._Lineup(
    subject,
    microbatch_size=case.microbatch_size,
    l2_clip_norm=1.0,
    on_next=lambda name: None,
  )


@pytest.mark.filterwarnings("ignore:optax.global_norm:DeprecationWarning")
def test_peers_compute_the_same_sum_or_say_why_not():
  one = lineup()
  subject = one._subject
  reference = engines.clipping.clipped_grad(subject.loss_fn, l2_clip_norm=1.0)
  grad_sum = jax.jit(reference)(subject.params, subject.batch).grad_sum
  one._sums[True] = jax.device_get(jax.tree.leaves(grad_sum))
  one.add_jax_peers()
  one.add_torch_peers()
  by_name = {c.name: c for c in one.contenders}
  assert tuple(by_name) == PEERS
  for name in PEERS[:2]:
    assert by_name[name].program is not None
    assert 0 < by_name[name].facts["sum_error"] < 5e-5
  if importlib.util.find_spec("torch") is None:
    for name in PEERS[2:]:
      assert "not installed: torch" in by_name[name].note
      assert "ppnet[peers]" in by_name[name].note
  else:
    assert all(by_name[name].program is not None for name in PEERS[2:])


def test_a_peer_that_cannot_do_a_case_says_so():
  notes = {}
  for name in ("tiny/mb4", "tiny/mb6"):
    one = lineup(name)
    one._add = lambda name, build, reason="", **_: notes.update({name: reason})
    one.add_jax_peers()
    assert notes[PEERS[1]] == "has no microbatches"
    one._subject = dataclasses.replace(one._subject, decoder=None)
    one.add_torch_peers()
    assert "no equal PyTorch model" in notes[PEERS[2]]
    expected = "" if name == "tiny/mb6" else "wants batches of whole"
    assert notes[PEERS[0]].startswith(expected)


def test_a_row_with_another_sum_is_not_measured():
  one = lineup()
  one._sums[True] = jax.tree.leaves(one._subject.params)
  wrong = jax.tree.map(lambda leaf: 1.001 * leaf, one._subject.params)
  program = engines.measure.Program(
    run=lambda: (wrong, None), memory_bytes=1, flops=None
  )
  one._add("wrong", lambda: program)
  (row,) = one.contenders
  assert row.program is None
  assert row.note.startswith("wrong sum: off by 1.0e-03")


def test_a_row_that_does_not_fit_leaves_the_others_alone():
  def too_large():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory\nmore")

  one = lineup()
  one._add("large", too_large)
  assert one.contenders[0].program is None
  assert one.contenders[0].note == "RESOURCE_EXHAUSTED: no memory"


def test_a_case_is_named_by_its_shape_and_options():
  case = engines.parse_case("d256/remat/mb4")
  assert (case.microbatch_size, case.remat) == (4, True)
  assert case.shape == engines.SHAPES["d256"]
  assert engines.parse_case("own/mb8").shape is None
  names = [case.name for case in engines.parse_cases("default")]
  assert names == ["d256", "d256/mb4", "d512", "d512/mb4"]
  names = [case.name for case in engines.parse_cases("all,d256")]
  assert "own" in names
  assert "1b" not in names  # Needs a GPU.
  assert len(set(names)) == len(names)


@pytest.mark.parametrize(
  ("names", "message"),
  [
    ("d255", "Did you mean 'd256'"),
    ("d256/mb0", "option='mb0'"),
    ("d256/fast", "/mbN"),
    ("own/remat", "with a shape"),
    ("1b", "a GPU"),
    (" , ", "name a case"),
  ],
)
def test_a_case_that_cannot_be_run_is_refused(names, message):
  with pytest.raises(ValueError, match=message):
    engines.parse_cases(names)


def test_the_shapes_are_the_ones_that_the_table_names():
  sizes = {}
  for name, shape in engines.SHAPES.items():
    model = engines.llama.Llama(shape.decoder)
    tokens = jnp.zeros((1, shape.num_tokens), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(params))
  d256 = 2 * 2048 * 256 + 6 * (4 * 256**2 + 3 * 256 * 688 + 2 * 256) + 256
  assert sizes["d256"] == d256
  assert sizes["1b"] == 1_235_814_400  # Llama 3.2 1B, tied.
  shape = engines.SHAPES["d512"]
  assert (shape.num_tokens, shape.batch_size) == (256, 8)
  assert dataclasses.asdict(engines.SHAPES["d256"].goal) == {
    "time_ratio": 1.05,
    "memory_ratio": 1.10,
  }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:optax.global_norm:DeprecationWarning")
def test_own_is_the_configuration_s_model_and_data(tmp_path):
  config = bench_config(cases="own/mb8", peers=True)
  record = engines.run(config, tmp_path, log=io.StringIO())
  facts = record["cases"]["own/mb8"]
  assert facts["batch_size"] == config.perf.microbatch_size
  assert facts["attention_noise"]["stddev"] == 0.1
  by_name = {row["name"]: row for row in record["rows"]}
  in_torch = PEERS[2:]
  for name in by_name.keys() - {"optax.contrib DP aggregate", *in_torch}:
    assert by_name[name]["time_ratio"] > 0, name
  for name in in_torch:
    assert "PyTorch model" in by_name[name]["note"]


@pytest.mark.slow
def test_a_benchmark_of_its_real_size(tmp_path):
  record = engines.run(bench_config(cases="d256", rounds=3), tmp_path)
  rows = {row["name"]: row for row in record["rows"]}
  # Temporary memory does not depend on who else uses the machine.
  assert rows["VMAP"]["memory_ratio"] > 1.4
  assert rows["VMAP"]["flops_ratio"] == 1.0
  assert rows["GHOST"]["flops_ratio"] > 1.3
  assert all(row["sum_error"] < 1e-5 for row in rows.values())
