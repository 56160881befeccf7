"""LaTeX of tables: what is escaped, what is laid out, and that it compiles."""

import shutil
import subprocess

import pytest

from ppnet.report import latex

_DOCUMENT = r"""\documentclass{article}
\usepackage[landscape,margin=1cm]{geometry}
\usepackage{booktabs}
\begin{document}
\begin{table}\centering\input{table.tex}\end{table}
\end{document}
"""
_LINE = [
  "fashion_mnist",
  "no_dp_noise_no_attention_noise",
  *["0.763 ± 0.010 †"] * 6,
  "∞",
  "2.14",
]


def table(**changes):
  return latex.table(
    ["task", "model", *["AUC-ROC"] * 5, "TPR at 0.1 % FPR", "ε", "ε ≥"],
    [_LINE, [], ["", "{a} & $b^2$ #1 ~ \\", *["–"] * 8]],
    num_left=2,
    **changes,
  )


def test_rows_rules_and_columns():
  assert latex.table(["a", "b"], [["x", "1"], [], ["y_z", "2"]]).split(
    "\n"
  ) == [
    r"\begin{tabular}{lr}",
    r"\toprule",
    r"a & b \\",
    r"\midrule",
    r"x & 1 \\",
    r"\midrule",
    r"y\_z & 2 \\",
    r"\bottomrule",
    r"\end{tabular}",
    "",
  ]


def test_columns_of_words_are_broken_into_lines():
  text = latex.table(["a", "b"], [["x " * 200, "1"]], widths=(0.2, 0.7))
  columns = r"p{0.2\linewidth}p{0.7\linewidth}"
  assert text.startswith(rf"\begin{{tabular}}{{{columns}}}")


def test_notes_are_printed_and_not_only_comments():
  text = table(notes=["50 % of † is _not_ ≤ 3."])
  (line,) = (line for line in text.split("\n") if "50" in line)
  assert line == r"50 \% of $^\dagger$ is \_not\_ $\leq$ 3.\par"
  assert text.count("{") == text.count("}")


@pytest.mark.skipif(
  shutil.which("pdflatex") is None, reason="pdflatex is not installed"
)
@pytest.mark.parametrize(
  "text",
  [
    latex.table(["a"], [["".join(map(chr, latex._ESCAPES))]]),
    table(notes=["A ± B → C × 2° − δ σ ≤ 1."] * 9),
    latex.table(["a", "b"], [["word " * 90, "1"]], widths=(0.5, 0.4)),
  ],
  ids=["signs", "results", "words"],
)
def test_it_compiles_and_fits_a_page_in_landscape(tmp_path, text):
  (tmp_path / "table.tex").write_text(text)
  (tmp_path / "main.tex").write_text(_DOCUMENT)
  found = subprocess.run(
    ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    errors="replace",
    check=False,
  )
  assert found.returncode == 0, found.stdout[-2000:]
  assert "Overfull" not in found.stdout
  assert (tmp_path / "main.pdf").stat().st_size > 5000
  # Fails if: a sign is not escaped, a brace is open, or the table is too wide.
