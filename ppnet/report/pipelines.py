"""What an experiment does to its records: the paper's Table 1, and pictures.

Read from the transformations in use and from records that went through them.
"""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ppnet import config as config_lib
from ppnet.core import checks, records
from ppnet.data import examples as examples_lib
from ppnet.data import pipeline, prepare, sources, tokenizers
from ppnet.report import latex, pipeline_figures, pipeline_table

_TOKENIZER_WORDS = {
  config_lib.TokenizerKind.PUBLIC: "SentencePiece, learnt from public text",
  config_lib.TokenizerKind.BYTES: "bytes",
  config_lib.TokenizerKind.FILE: "SentencePiece, published",
  config_lib.TokenizerKind.PRIVATE: "SentencePiece, learnt from the records",
}
_COLUMNS = (
  "modality",
  "decode",
  "normalisation",
  "feature_extraction",
  "augmentation",
  "num_records",
  "unit",
  "shape_before",
  "shape_after",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenize:
  """The experiment's own tokenizer as a stage."""

  tokenizer: tokenizers.Tokenizer
  words: str
  max_tokens: int

  kind: ClassVar[str] = "feature extraction"

  @property
  def label(self) -> str:
    """Words for a table."""
    return f"{self.words}, at most {self.max_tokens:,} tokens"

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the text by its ids."""
    ids = self.tokenizer.encode(element["text"])[: self.max_tokens]
    return {**element, "text": np.array(ids, np.int32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Learnt:
  """A stem: it extracts features in the network, and changes nothing here."""

  label: str
  kind: ClassVar[str] = "feature extraction"

  def map(self, element: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same element."""
    return element


def _pipelines(
  config: config_lib.ExperimentConfig,
  dataset: examples_lib.Examples,
  prepared_dir: pathlib.Path,
  card: prepare.Card,
) -> dict[str, list[Any]]:
  """Modality -> its transformations in order."""
  found: dict[str, list[Any]] = {
    name: [*chain.fixed, *chain.random, *chain.stacked]
    for name, chain in dataset.chains.items()
  }
  if card.has_text:
    tokenizer = tokenizers.load(
      config.data, prepared_dir, class_names=card.class_names
    )
    found["text"] = [
      *pipeline.text_chain(config),
      Tokenize(
        tokenizer=tokenizer,
        words=_TOKENIZER_WORDS[config.data.tokenizer],
        max_tokens=dataset.layout.longest,
      ),
    ]
  return found


def _samples(
  source: sources.Source, names: Sequence[str], *, count: int
) -> dict[str, list[dict[str, Any]]]:
  """Modality -> the first items of it in the data, still encoded."""
  found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
  for position in range(len(source)):
    if all(len(items) >= count for items in found.values()):
      break
    record = source[position]
    for name, items in found.items():
      own = [record.text] if name == "text" else record.media.get(name, ())
      items += [
        {"id": record.id, name: item} for item in own[: count - len(items)]
      ]
  return found


def write(
  config: config_lib.ExperimentConfig,
  prepared_dir: pathlib.Path,
  workdir: pathlib.Path,
  *,
  num_records: int = 256,
) -> str:
  """Writes the table and one picture per modality.

  Writes `table.json`, `table.md`, `table.tex`, `table.csv` and
  `figures/pipeline_<modality>.png` (and .pdf), of training records as they are:
  neither is covered by the guarantee.

  Args:
    config: the experiment.
    prepared_dir: its prepared data.
    workdir: where to write.
    num_records: records whose shapes and numbers are in the table.

  Returns:
    The table in Markdown.

  Raises:
    ValueError: the data are not prepared, or no record has a modality.
    sources.BadRecordError: one of the records cannot be used.
  """
  dataset = pipeline.examples(
    config, prepared_dir, split="train", augmented=True
  )
  source = pipeline.open_source(config.data, prepared_dir, split="train")
  card = prepare.read_card(prepared_dir)
  found = _pipelines(config, dataset, prepared_dir, card)
  samples = _samples(source, list(found), count=num_records)
  if not found:
    checks.fail("a modality that the model reads", source=source.description)
  rows = pipeline_table.rows(_with_stems(config, found), samples)
  text = pipeline_table.markdown(rows)
  records.write_json(workdir / "table.json", {"rows": rows})
  records.write_bytes(workdir / "table.md", f"{text}\n".encode())
  records.write_bytes(workdir / "table.tex", _latex(rows).encode())
  records.write_bytes(workdir / "table.csv", _csv(rows).encode())
  for name, transforms in found.items():
    pipeline_figures.write(
      workdir / "figures" / f"pipeline_{name}",
      transforms,
      samples[name][0],
      modality=name,
      seed=config.data.augmentation_seed,
    )
  return text


def _with_stems(
  config: config_lib.ExperimentConfig, found: Mapping[str, Sequence[Any]]
) -> dict[str, list[Any]]:
  """The same, with what the network extracts named at the end."""
  stems = {}
  if config.model.image is not None:
    patches = getattr(config.model.image, "patches", None)
    stems["image"] = (
      "learnt CNN stem" if patches is None else "learnt patch transformer"
    )
  if config.model.audio is not None:
    stems["audio"] = "learnt projection of groups of frames"
  return {
    name: [*transforms, _Learnt(label=stems[name])]
    if name in stems
    else list(transforms)
    for name, transforms in found.items()
  }


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
  """All columns, unrounded."""
  flat = [
    {name: row[name] for name in _COLUMNS}
    | {
      f"{key}/{name}": value
      for key in ("nonprivate/before", "nonprivate/after")
      for name, value in row[key].items()
    }
    for row in rows
  ]
  out = io.StringIO()
  writer = csv.DictWriter(out, fieldnames=list(flat[0]), lineterminator="\n")
  writer.writeheader()
  writer.writerows(flat)
  return out.getvalue()


def _latex(rows: Sequence[Mapping[str, Any]]) -> str:
  """The table of the paper: what is done to each modality."""
  columns = ("modality", "normalisation", "feature_extraction", "augmentation")
  return latex.table(
    ["Modality", "Normalisation", "Feature extraction", "Augmentation"],
    [[row[name] or "–" for name in columns] for row in rows],
    widths=(0.1, 0.21, 0.27, 0.27),
  )
