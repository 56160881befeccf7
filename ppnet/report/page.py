"""One HTML page of a table: numbers, pictures, configurations, versions.

Everything is in the file itself, pictures too, so that it can be mailed and
archived. It asks for nothing from anywhere, and runs no script.
"""

import base64
import html
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ppnet.core import records

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto;
  max-width: 75rem; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.7rem; text-align: right; white-space: nowrap; }
th.left, td.left { text-align: left; }
thead th { border-top: 2px solid #222; border-bottom: 1px solid #222; }
tbody tr.first td { border-top: 1px solid #bbb; }
tbody tr:last-child td { border-bottom: 2px solid #222; }
td.hole { background: #fde8e0; }
img { max-width: 100%; height: auto; }
figcaption { color: #555; }
pre { background: #f5f5f5; padding: 0.7rem; overflow-x: auto;
  font-size: 0.8rem; }
summary { cursor: pointer; }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd; }
  thead th, tbody tr:last-child td { border-color: #ddd; }
  tbody tr.first td { border-color: #555; }
  td.hole { background: #5a2a1a; } pre { background: #242424; }
  img { background: #fff; } figcaption { color: #aaa; }
}
"""


def page(
  *,
  title: str,
  header: Sequence[str],
  groups: Sequence[Sequence[Sequence[str]]],
  notes: Sequence[str],
  figures: Sequence[pathlib.Path],
  configs: Mapping[str, Mapping[str, Any]],
  hole: str,
  num_left: int = 2,
) -> str:
  """Lays out a page.

  Args:
    title: of page and table.
    header: a word for each column.
    groups: rows of cells, between which a line is drawn.
    notes: paragraphs under the table.
    figures: PNG files, in order; the name is the caption.
    configs: heading -> content of a run's `config.json`.
    hole: the text of a cell that has no record.
    num_left: how many of the first columns hold words.

  Returns:
    HTML.
  """
  columns = [
    f'<th class="{"left" if number < num_left else ""}">{_text(name)}</th>'
    for number, name in enumerate(header)
  ]
  body = [
    _row(row, first=number == 0, hole=hole, num_left=num_left)
    for group in groups
    for number, row in enumerate(group)
  ]
  return "\n".join(
    [
      '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
      f"<h1>{_text(title)}</h1>",
      f'<div class="wide"><table><thead><tr>{"".join(columns)}</tr></thead>',
      f"<tbody>{''.join(body)}</tbody></table></div>",
      *(f"<p>{_text(note)}</p>" for note in notes),
      *map(_figure, figures),
      "<h2>Configurations, commits and versions</h2>" if configs else "",
      *(_details(name, config) for name, config in configs.items()),
      "</body></html>",
    ]
  )


def write(path: pathlib.Path, text: str) -> None:
  """Writes a page whole or not at all."""
  records.write_bytes(path, f"{text}\n".encode())


def _text(value: str) -> str:
  """Text that is no markup."""
  return html.escape(value)


def _row(cells: Sequence[str], *, first: bool, hole: str, num_left: int) -> str:
  """One line of the table."""
  found = []
  for number, cell in enumerate(cells):
    name = "left" if number < num_left else "hole" if cell == hole else ""
    found.append(f'<td class="{name}">{_text(cell)}</td>')
  return f'<tr class="{"first" if first else ""}">{"".join(found)}</tr>'


def _figure(path: pathlib.Path) -> str:
  """A picture in the page itself."""
  content = base64.b64encode(path.read_bytes()).decode()
  name = _text(path.stem.replace("_", " "))
  return (
    f'<figure><img alt="{name}" src="data:image/png;base64,{content}">'
    f"<figcaption>{name}</figcaption></figure>"
  )


def _details(name: str, config: Mapping[str, Any]) -> str:
  """A configuration that unfolds, its commit beside its name."""
  text = json.dumps(config, indent=1, ensure_ascii=False, sort_keys=True)
  commit = _text(str(config.get("commit") or "no commit"))
  return (
    f"<details><summary>{_text(name)} ({commit})</summary>"
    f"<pre>{_text(text)}</pre></details>"
  )
