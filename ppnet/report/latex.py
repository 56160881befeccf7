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
    "†": r"\dag{}",
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
  header: Sequence[str], rows: Sequence[Sequence[str]], *, num_left: int = 1
) -> str:
  """A `tabular` with the rules of booktabs; text is escaped.

  Args:
    header: a word for each column.
    rows: a cell for each column; an empty row is a rule.
    num_left: how many of the first columns are set to the left, the others to
      the right.
  """
  columns = "l" * num_left + "r" * (len(header) - num_left)
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
  return "\n".join(lines) + "\n"
