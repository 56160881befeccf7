"""How every figure is written: PNG and PDF, whole or not at all."""

import io
import pathlib

from matplotlib import figure

from ppnet.core import records


def save(fig: figure.Figure, stem: pathlib.Path) -> pathlib.Path:
  """Writes `<stem>.png` and `<stem>.pdf`; their folder is made.

  Returns:
    The path of the PNG file.
  """
  stem.parent.mkdir(parents=True, exist_ok=True)
  # Without the date, the same records give the same file.
  for suffix, metadata in (("pdf", {"CreationDate": None}), ("png", {})):
    content = io.BytesIO()
    fig.savefig(content, format=suffix, dpi=150, metadata=metadata)
    records.write_bytes(
      stem.with_name(f"{stem.name}.{suffix}"), content.getvalue()
    )
  return stem.with_name(f"{stem.name}.png")
