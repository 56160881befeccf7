"""One HTML page of tables: numbers, pictures, configurations, versions.

Everything is in the file itself, pictures too, so that it can be mailed and
archived. It asks for nothing from anywhere, and runs no script.
"""

import base64
import dataclasses
import html
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ppnet.core import records

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto;
  max-width: 80rem; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.82rem; }
th, td { padding: 0.25rem 0.4rem; text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th.left, td.left { text-align: left; white-space: normal; }
td.long { white-space: normal; text-align: left; min-width: 12rem; }
thead th { border-top: 2px solid #222; border-bottom: 1px solid #222; }
tbody tr.first td { border-top: 1px solid #bbb; }
tbody tr:last-child td { border-bottom: 2px solid #222; }
td.hole { background: #fde8e0; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; }
figcaption { color: #555; }
.many { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); }
.many figure { margin: 0; }
pre { background: #f5f5f5; padding: 0.7rem; overflow-x: auto;
  font-size: 0.8rem; }
summary { cursor: pointer; }
@media screen and (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd; }
  thead th, tbody tr:last-child td { border-color: #ddd; }
  tbody tr.first td { border-color: #555; }
  td.hole { background: #5a2a1a; } pre { background: #242424; }
  img { background: #fff; } figcaption { color: #aaa; }
}
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  body { font-size: 10pt; margin: 0; max-width: none; padding: 0; }
  table { font-size: 7.5pt; } th, td { padding: 0.15rem 0.3rem; }
  img { max-height: 160mm; width: auto; }
  .many { grid-template-columns: repeat(3, 1fr); }
  tr, figure { break-inside: avoid; } h1, h2, h3 { break-after: avoid; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 6pt; }
}
"""
_COMMIT_LETTERS = 12
_LONG = 40  # Letters; a cell of more is broken into lines.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
  """A PNG file and what is written under it."""

  path: pathlib.Path
  caption: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
  """Pictures of a chapter.

  Attributes:
    pictures: in order.
    title: their heading; empty has none.
    is_grid: whether they are small enough to stand beside each other.
  """

  pictures: Sequence[Picture]
  title: str = ""
  is_grid: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chapter:
  """One table with what belongs to it.

  Attributes:
    title: its heading.
    header: a word for each column; empty where there is no table.
    groups: rows of cells, between which a line is drawn.
    notes: paragraphs under the table.
    sections: pictures under the notes; those without any are left out.
    num_left: how many of the first columns hold words.
  """

  title: str
  header: Sequence[str]
  groups: Sequence[Sequence[Sequence[str]]]
  notes: Sequence[str] = ()
  sections: Sequence[Section] = ()
  num_left: int = 2


def page(
  chapters: Sequence[Chapter],
  *,
  title: str,
  configs: Mapping[str, Mapping[str, Any]],
  hole: str,
) -> str:
  """Lays out a page.

  Args:
    chapters: tables, one at least.
    title: of the page; a chapter of the same title has no heading of its own.
    configs: heading -> content of a run's `config.json`.
    hole: the text of a cell that has no record.

  Returns:
    HTML.
  """
  return "\n".join(
    [
      '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
      f"<h1>{_text(title)}</h1>",
      *(
        part
        for chapter in chapters
        for part in _chapter(chapter, page_title=title, hole=hole)
      ),
      *_sources(configs),
      "</body></html>",
    ]
  )


def write(path: pathlib.Path, text: str) -> None:
  """Writes a page whole or not at all."""
  records.write_bytes(path, f"{text}\n".encode())


def _chapter(chapter: Chapter, *, page_title: str, hole: str) -> list[str]:
  """Heading, table, notes, pictures."""
  parts = []
  if chapter.title != page_title:
    parts.append(f"<h2>{_text(chapter.title)}</h2>")
  if chapter.header:
    parts.append(
      _table(
        chapter.header, chapter.groups, hole=hole, num_left=chapter.num_left
      )
    )
  parts += [f"<p>{_text(note)}</p>" for note in chapter.notes]
  for section in chapter.sections:
    if section.title and section.pictures:
      parts.append(f"<h3>{_text(section.title)}</h3>")
    name = "many" if section.is_grid else ""
    drawn = "".join(map(_figure, section.pictures))
    if drawn:
      parts.append(f'<div class="{name}">{drawn}</div>')
  return parts


def _table(
  header: Sequence[str],
  groups: Sequence[Sequence[Sequence[str]]],
  *,
  hole: str,
  num_left: int,
) -> str:
  """Rows in groups; a wide one scrolls by itself."""
  columns = "".join(
    f'<th class="{"left" if number < num_left else ""}">{_text(name)}</th>'
    for number, name in enumerate(header)
  )
  body = "".join(
    _row(row, first=number == 0, hole=hole, num_left=num_left)
    for group in groups
    for number, row in enumerate(group)
  )
  return (
    f'<div class="wide"><table><thead><tr>{columns}</tr></thead>'
    f"<tbody>{body}</tbody></table></div>"
  )


def _text(value: str) -> str:
  """Text that is no markup."""
  return html.escape(value)


def _row(cells: Sequence[str], *, first: bool, hole: str, num_left: int) -> str:
  """One line of the table."""
  found = []
  for number, cell in enumerate(cells):
    name = "left" if number < num_left else "hole" if cell == hole else ""
    text = _text(cell)
    if 0 < number < num_left:
      text = text.replace("_", "_<wbr>")  # A name may be broken there.
    if len(cell) > _LONG:
      name = "long"
    found.append(f'<td class="{name}">{text}</td>')
  return f'<tr class="{"first" if first else ""}">{"".join(found)}</tr>'


def _figure(picture: Picture) -> str:
  """A picture in the page itself."""
  content = base64.b64encode(picture.path.read_bytes()).decode()
  caption = _text(picture.caption)
  return (
    f'<figure><img alt="{caption}" src="data:image/png;base64,{content}">'
    f"<figcaption>{caption}</figcaption></figure>"
  )


def _sources(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Where the numbers come from: commits, versions, configurations."""
  if not configs:
    return []
  packages = sorted(
    {p for c in configs.values() for p in c.get("versions", ())}
  )
  # One line for all runs that were made by the same program.
  made: dict[tuple[str, ...], list[str]] = {}
  for name, config in configs.items():
    versions = config["versions"]
    by = (
      str(config["commit"] or "no commit"),
      str(config["python"]),
      *(str(versions.get(package) or "–") for package in packages),
    )
    made.setdefault(by, []).append(name)
  lines = [
    [
      "all" if len(names) == len(configs) else "; ".join(names),
      by[0][:_COMMIT_LETTERS],
      *by[1:],
    ]
    for by, names in made.items()
  ]
  return [
    "<h2>Commits and versions</h2>",
    _table(
      ["runs", "commit", "Python", *packages], [lines], hole="", num_left=2
    ),
    "<h2>Configurations</h2>",
    *(_details(name, config) for name, config in configs.items()),
  ]


def _details(name: str, config: Mapping[str, Any]) -> str:
  """A configuration that unfolds, its commit beside its name."""
  text = json.dumps(config, indent=1, ensure_ascii=False, sort_keys=True)
  commit = _text(str(config["commit"] or "no commit"))
  return (
    f"<details><summary>{_text(name)} ({commit})</summary>"
    f"<pre>{_text(text)}</pre></details>"
  )
