"""Tables and the figure show what bench.json says, and nothing more."""

import pytest

from ppnet.core import records
from ppnet.report import ratios


def row(name, time=None, memory=None, **changes):
  known = time is not None
  made = {
    "name": name,
    "case": "one",
    "framework": "jax",
    "is_peer": False,
    "is_baseline": False,
    "time_ratio": time,
    "time_ratio_quartiles": [time * 0.9, time * 1.2] if known else None,
    "cpu_time_ratio": time,
    "memory_ratio": memory,
    "flops_ratio": 1.25 if known else None,
    "secs": 0.5 if known else None,
    "meets_time": time <= 1.05 if known else None,
    "meets_memory": memory <= 1.10 if known else None,
    "meets_both": time <= 1.05 and memory <= 1.10 if known else None,
    "note": "",
  }
  return made | changes


def make_record(*rows):
  base = row("non-private", 1.0, 1.0, is_baseline=True, meets_time=None)
  return {
    "subject": "ENGINES",
    "rounds": 10,
    "machine": {
      "processor": "P",
      "cores": 2,
      "backend": "cpu",
      "versions": {"jax": "0.1", "torch": None},
    },
    "cases": {
      "one": {
        "num_parameters": 1234,
        "batch_size": 8,
        "microbatch_size": 4,
        "num_tokens": 16,
        "decoder": {"embed_dim": 32, "num_layers": 2},
        "goal": {"time_ratio": 1.05, "memory_ratio": 1.10},
        "others_cpu_share": 0.03,
        "is_quiet": True,
      }
    },
    "rows": [base, *rows],
  }


RECORD = make_record(
  row("FAST", 1.02, 1.30),
  row("LEAN", 1.40, 1.05),
  row("BAD", 1.41, 1.31),
  row("peer", 1.20, 1.50, is_peer=True),
  row("gone", is_peer=True, note="not installed: torch"),
)


@pytest.mark.parametrize(
  "lay_out", [ratios.bench_table, ratios.bench_markdown], ids=["text", "md"]
)
def test_every_row_is_shown_with_what_it_meets(lay_out):
  text = lay_out(RECORD)
  lines = {
    name: next(x for x in text.splitlines() if name in x)
    for name in ("FAST", "LEAN", "BAD", "peer", "gone", "non-private")
  }
  assert "1.02" in lines["FAST"]
  assert "0.92–1.22" in lines["FAST"]
  assert "time only" in lines["FAST"]
  assert "memory only" in lines["LEAN"]
  assert "neither" in lines["BAD"]
  assert lines["gone"].count("–") >= 5  # Holes, not zeros.
  assert "gone: not installed: torch" in text
  assert "in microbatches of 4" in text
  assert "3%" in text  # Others' share.
  assert "torch None" not in text


def test_the_conclusion_names_what_is_met_and_what_is_not():
  assert ratios.conclusion(RECORD["rows"], busy_share=None) == (
    "goal not met; fastest FAST 1.02 / 1.30, leanest LEAN 1.40 / 1.05; peers:"
    " fastest peer 1.20 / 1.50, leanest peer 1.20 / 1.50; faster and leaner"
    " than every peer: FAST."
  )
  met = make_record(row("A", 1.05, 1.10))["rows"]
  assert ratios.conclusion(met, busy_share=None) == "goal met by A 1.05 / 1.10."
  assert ratios.conclusion(met[:1], busy_share=None) == (
    "No engine was measured."
  )
  # No verdict from a busy machine without saying so.
  assert ratios.conclusion(met, busy_share=0.21) == (
    "provisional, as others had 21% of the processor: goal met by A 1.05 /"
    " 1.10."
  )


def test_a_busy_machine_makes_a_table_provisional():
  facts = RECORD["cases"]["one"] | {"others_cpu_share": 0.4, "is_quiet": False}
  busy = RECORD | {"cases": {"one": facts}}
  assert "provisional" in ratios.bench_table(busy)
  assert "provisional" in ratios.bench_markdown(busy)
  assert "provisional" not in ratios.bench_table(RECORD)


def test_both_peers_must_be_beaten_at_once():
  rows = make_record(
    row("E", 1.1, 1.1),
    row("quick", 1.0, 2.0, is_peer=True),
    row("small", 2.0, 1.2, is_peer=True),
  )["rows"]
  assert ratios.conclusion(rows, busy_share=None).endswith(
    "than every peer: none."
  )


def test_the_figure_shows_each_measured_row_and_the_goal():
  fig = ratios.draw(RECORD)
  (ax,) = fig.axes
  assert {text.get_text() for text in ax.texts} == {
    "FAST",
    "LEAN",
    "BAD",
    "peer",
  }
  points = {
    (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
    for line in ax.lines
  }
  assert (1.02, 1.30) in points
  assert (1.0, 1.0) in points
  region = ax.collections[0].get_paths()[0].get_extents()
  assert (region.x1, region.y1) == (1.05, 1.10)
  for low, high in (ax.get_xlim(), ax.get_ylim()):
    assert low < 1 < high


def test_names_of_equal_points_do_not_overlap():
  fig = ratios.draw(make_record(*(row(f"r{i}", 1.2, 1.2) for i in range(4))))
  heights = sorted(text.xyann[1] for text in fig.axes[0].texts)
  gaps = [b - a for a, b in zip(heights, heights[1:], strict=False)]
  assert min(gaps) >= 11


def test_write_leaves_markdown_and_figures(tmp_path):
  records.write_json(tmp_path / "bench.json", RECORD)
  path = ratios.write(tmp_path)
  assert path == tmp_path / "figures" / "engines.png"
  assert path.stat().st_size > 10_000
  assert (tmp_path / "figures" / "engines.pdf").exists()
  assert "| FAST |" in (tmp_path / "bench.md").read_text()


def test_attention_s_figure_does_not_take_a_run_s_own_place(tmp_path):
  record = RECORD | {"subject": "ATTENTION"}
  records.write_json(tmp_path / "bench.json", record)
  assert ratios.write(tmp_path).name == "attention_cost.png"
  title = ratios.draw(record).get_suptitle()
  assert title.startswith("What noise in attention costs")


def test_a_record_without_rows_is_refused():
  with pytest.raises(ValueError, match="rows"):
    ratios.bench_table({"rows": []})
