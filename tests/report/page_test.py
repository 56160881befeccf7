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


def read(tmp_path, **changes):
  (tmp_path / "roc.png").write_bytes(_PIXEL)
  text = page.page(
    **{
      "title": "A <b>title</b>",
      "header": ["task", "model", "accuracy"],
      "groups": [[["fsdd", "a & b", "0.5"], ["fsdd", "c", "–"]]],
      "notes": ["p < 0.05"],
      "figures": [tmp_path / "roc.png"],
      "configs": {"fsdd, c": {"config": {"seed": 3}, "commit": "abc<def"}},
      "hole": "–",
    }
    | changes
  )
  reader = _Reader()
  reader.feed(text)
  assert not reader.open  # Every element ends.
  return text, reader


def test_cells_are_text_and_holes_are_marked(tmp_path):
  text, reader = read(tmp_path)
  assert reader.cells == ["fsdd", "a & b", "0.5", "fsdd", "c", "–"]
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
