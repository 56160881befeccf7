"""Text and tables for LaTeX (booktabs)."""

from collections.abc import Sequence

_ESCAPES = str.maketrans(
  {
    "&": r"\&",
    "%": r"\%",
    "_": r"\_",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    # In the default text font these are other signs.
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "×": r"$\times$",
    "→": r"$\to$",
    "–": "--",
    "−": r"$-$",
    "±": r"$\pm$",
    "°": r"$^\circ$",
    "ε": r"$\varepsilon$",
    "δ": r"$\delta$",
    "∞": r"$\infty$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    # Of the text fonts only some installations have it as outlines.
    "†": r"$^\dagger$",
    "σ": r"$\sigma$",
  }
)


def escape(text: str) -> str:
  r"""Text as LaTeX prints it.

  >>> print(escape("50 % ± 3, ε = ∞"))
  50 \% $\pm$ 3, $\varepsilon$ = $\infty$
  """
  return text.translate(_ESCAPES)


def table(
  header: Sequence[str],
  rows: Sequence[Sequence[str]],
  *,
  num_left: int = 1,
  notes: Sequence[str] = (),
  widths: Sequence[float] = (),
) -> str:
  r"""A `tabular` with the rules of booktabs; text is escaped.

  To be read with `\input` in a `table`; the preamble needs
  `\usepackage{booktabs}`.

  Args:
    header: a word for each column.
    rows: a cell for each column; an empty row is a rule.
    num_left: how many of the first columns are set to the left, the others to
      the right.
    notes: paragraphs under the table. A table that has some is set small and
      tight: ten columns fit a page in landscape.
    widths: of columns whose words are broken into lines, as shares of the
      line, together at most 0.85; `num_left` is then unused.
  """
  columns = "l" * num_left + "r" * (len(header) - num_left)
  if widths:
    columns = "".join(rf"p{{{width:g}\linewidth}}" for width in widths)
  lines = [
    rf"\begin{{tabular}}{{{columns}}}",
    r"\toprule",
    f"{' & '.join(map(escape, header))} \\\\",
    r"\midrule",
    *(
      f"{' & '.join(map(escape, row))} \\\\" if row else r"\midrule"
      for row in rows
    ),
    r"\bottomrule",
    r"\end{tabular}",
  ]
  if notes:
    lines = [
      r"{\footnotesize\setlength{\tabcolsep}{3pt}%",
      *lines,
      r"\par\medskip",
      r"\begin{minipage}{\linewidth}",
      *(rf"{escape(note)}\par" for note in notes),
      r"\end{minipage}}",
    ]
  return "\n".join(lines) + "\n"
