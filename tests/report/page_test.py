"""A page holds everything itself, and nothing that is not text is markup."""

import html.parser

from ppnet.report import page

_PIXEL = bytes.fromhex(
  "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489"
  "0000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


class _Reader(html.parser.HTMLParser):
  """Collects what a browser would see."""

  def __init__(self):
    super().__init__()
    self.open, self.cells, self.holes, self.links = [], [], 0, []

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    if tag not in ("meta", "img"):
      self.open.append(tag)
    if tag == "td":
      self.cells.append("")
      self.holes += attrs["class"] == "hole"
    self.links += [
      value for name, value in attrs.items() if name in ("src", "href")
    ]

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] == "td":
      self.cells[-1] += data


def made(commit, *, jax="1.2", **fields):
  return {
    "config": fields,
    "commit": commit,
    "python": "3.11",
    "versions": {"jax": jax, "ppnet": None},
  }


def read(tmp_path, **changes):
  (tmp_path / "roc.png").write_bytes(_PIXEL)
  picture = page.Picture(path=tmp_path / "roc.png", caption="a < b")
  text = page.page(
    [
      page.Chapter(
        title="A <b>title</b>",
        header=["task", "model", "accuracy"],
        groups=[[["fsdd", "a & b", "0.5"], ["fsdd", "c", "–"]]],
        notes=["p < 0.05"],
        sections=[page.Section(title="Curves", pictures=[picture])],
      ),
      *(changes.pop("more", ())),
    ],
    **{
      "title": "A <b>title</b>",
      "configs": {"fsdd, c": made("abc<def", seed=3)},
      "hole": "–",
    }
    | changes,
  )
  reader = _Reader()
  reader.feed(text)
  assert not reader.open  # Every element ends.
  return text, reader


def test_cells_are_text_and_holes_are_marked(tmp_path):
  text, reader = read(tmp_path)
  assert reader.cells[:6] == ["fsdd", "a & b", "0.5", "fsdd", "c", "–"]
  assert reader.holes == 1
  assert "<b>" not in text
  assert "abc&lt;def" in text
  assert "&quot;seed&quot;: 3" in text


def test_nothing_is_asked_from_anywhere(tmp_path):
  text, reader = read(tmp_path)
  assert len(reader.links) == 1
  assert reader.links[0].startswith("data:image/png;base64,")
  assert "http" not in text
  assert "<script" not in text


def test_runs_of_one_program_share_a_line_of_versions(tmp_path):
  text, reader = read(
    tmp_path,
    configs={
      "a": made("aaaa"),
      "b": made("aaaa"),
      "c": made("aaaa", jax="1.3"),
    },
  )
  assert reader.cells[6:] == [
    *("a; b", "aaaa", "3.11", "1.2", "–"),
    *("c", "aaaa", "3.11", "1.3", "–"),
  ]
  assert text.count("<details>") == 3
  _, reader = read(tmp_path, configs={"a": made(None), "b": made(None)})
  assert reader.cells[6:8] == ["all", "no commit"]


def test_chapters_have_headings_and_may_have_no_table(tmp_path):
  text, reader = read(
    tmp_path,
    more=[
      page.Chapter(title="Second", header=[], groups=[], notes=["By epoch."]),
    ],
  )
  # The first one's heading is the page's.
  assert text.count("<h2>") == 3
  assert "<h2>Second</h2>" in text
  assert "<p>By epoch.</p>" in text
  assert len(reader.links) == 1
