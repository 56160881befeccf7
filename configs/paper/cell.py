"""One cell of a table of results: a task, and a model under some mechanisms.

  python -m ppnet.main --config=configs/paper/cell.py:fsdd,ppnet,cpu,/data \
      --workdir=DIR

The tables (table2.py, table3.py, leakage.py) run such cells; one can be run by
itself. The argument is TASK,ROW,SIZE,FOLDER. FOLDER holds `fashion-mnist/`,
`mnist/`, `fsdd/` and `womens-clothing-reviews/`.

| task | input | test records |
| --- | --- | --- |
| fashion_mnist | picture, ten kinds of clothes | the official ones |
| fsdd | recording, ten digits | all of one speaker, whom no model hears |
| reviews | text: is it recommended? | a fifth, by a hash of the record |
| digits | picture, recording and question | both official test splits |

| row | DP noise | clipping | attention noise | extras |
| --- | --- | --- | --- | --- |
| llama | | | | |
| non_private | | | | yes |
| ppnet | yes | yes | yes | yes |
| no_A, no_A_no_B | all of ppnet's but A and B | | | yes |
| clipping | | yes | | yes |
| attention_noise_S | | | standard deviation S | yes |
| dp_E | epsilon E | yes | | yes |

Extras are what multimodal training adds to the plain decoder on the same
tokens: modality dropout, where a record has several modalities.

With SIZE full the decoder is Llama-7B's. TRAIN and COMPILE cut it over the
mesh; an AUDIT trains each model on one device, which must hold it whole: 108 GB
of parameters, AdamW's moments and a sum of gradients, beside the activations.

  python -m ppnet.main \
      --config=configs/paper/cell.py:reviews,ppnet,full,/data \
      --config.job=COMPILE --config.topology=v5e:8x8

Hyper-parameters are round numbers near those of the quickstart, which is about
public digits, and are the same in every row: nothing was tuned on the records
of these tables, and no budget was spent on it (`tuning` says so in the record).
"""

import dataclasses
import pathlib
import runpy
from collections.abc import Callable

from ppnet import config, presets
from ppnet.core import checks

EPSILON = 8.0
_DELTA = 1e-5
_ATTENTION_STDDEV = 0.5
_CONSISTENCY_WEIGHT = 0.1
_CLIP_NORM = 1.0
_SIZES = ("cpu", "full")
# With all records: of a batch, and of the half that one model is trained on.
_FULL = {
  "fashion_mnist": (4096, 30_000),
  "fsdd": (256, 1250),
  "reviews": (1024, 9037),
  "digits": (256, 1350),
}
_CLOTHES = runpy.run_path(
  str(pathlib.Path(__file__).parents[1] / "fashion_mnist.py")
)["CLASS_NAMES"]


def _fashion_mnist(folder: pathlib.Path) -> config.DataConfig:
  return config.DataConfig(
    source=config.Source.IDX,
    path=str(folder / "fashion-mnist"),
    class_names=_CLOTHES,
    prompt="What is it?",
    vocab_size=128,
    image_size=28,
  )


def _fsdd(folder: pathlib.Path) -> config.DataConfig:
  return config.DataConfig(
    source=config.Source.FSDD,
    path=str(folder / "fsdd" / "fsdd-recordings.zip"),
    held_out_users=("theo",),
    prompt="Which digit?",
    vocab_size=96,
    audio=config.AudioConfig(sample_rate_hz=8000, max_secs=0.6),
  )


def _reviews(folder: pathlib.Path) -> config.DataConfig:
  return config.DataConfig(
    source=config.Source.CLOTHING_REVIEWS,
    path=str(
      folder
      / "womens-clothing-reviews"
      / "Womens Clothing E-Commerce Reviews.csv.gz"
    ),
    prompt="",
    tokenizer=config.TokenizerKind.BYTES,
    vocab_size=272,
    lengths=(96,),
  )


def _digits(folder: pathlib.Path) -> config.DataConfig:
  return config.DataConfig(
    source=config.Source.SPOKEN_WRITTEN_DIGITS,
    path=str(folder),
    prompt="",
    vocab_size=160,
    # The longest question behind its picture and recording.
    lengths=(40,),
    image_size=28,
    audio=config.AudioConfig(sample_rate_hz=8000, max_secs=0.6),
  )


_TASKS: dict[str, Callable[[pathlib.Path], config.DataConfig]] = {
  "fashion_mnist": _fashion_mnist,
  "fsdd": _fsdd,
  "reviews": _reviews,
  "digits": _digits,
}
_WITH_IMAGE = ("fashion_mnist", "digits")
_WITH_AUDIO = ("fsdd", "digits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
  """Which mechanisms are on."""

  dp_noise: bool = False
  clipping: bool = False
  attention_noise: bool = False
  extras: bool = True
  epsilon: float = EPSILON
  stddev: float = _ATTENTION_STDDEV


_ROWS = {
  "llama": _Row(extras=False),
  "non_private": _Row(),
  "ppnet": _Row(dp_noise=True, clipping=True, attention_noise=True),
  "no_dp_noise": _Row(clipping=True, attention_noise=True),
  "no_clipping": _Row(dp_noise=True, attention_noise=True),
  "no_attention_noise": _Row(dp_noise=True, clipping=True),
  "no_dp_noise_no_clipping": _Row(attention_noise=True),
  "no_dp_noise_no_attention_noise": _Row(clipping=True),
  "no_clipping_no_attention_noise": _Row(dp_noise=True),
  "clipping": _Row(clipping=True),
}


def _row(name: str) -> _Row:
  """A row by its name."""
  prefix, _, number = name.rpartition("_")
  try:
    if prefix == "dp":
      return _Row(dp_noise=True, clipping=True, epsilon=float(number))
    if prefix == "attention_noise":
      return _Row(attention_noise=True, stddev=float(number))
  except ValueError:
    pass  # Not a number: an unknown name.
  if name not in _ROWS:
    checks.fail(
      f"row to be dp_E, attention_noise_S, or one of {', '.join(_ROWS)}",
      checks.did_you_mean(name, _ROWS).strip(),
      row=name,
    )
  return _ROWS[name]


def get_config(
  argument: str = "fashion_mnist,ppnet,cpu,/data",
) -> config.ExperimentConfig:
  """The experiment of one cell."""
  parts = argument.split(",", 3)
  if len(parts) != 4:
    checks.fail("TASK,ROW,SIZE,FOLDER", argument=argument)
  task, row, size, folder = parts
  if task not in _TASKS or size not in _SIZES:
    checks.fail(
      f"task to be one of {', '.join(_TASKS)}, and size one of"
      f" {', '.join(_SIZES)}",
      task=task,
      size=size,
    )
  data = _TASKS[task](pathlib.Path(folder))
  chosen = _row(row)
  experiment = config.ExperimentConfig(
    name=f"{task}-{row}",
    job=config.Job.AUDIT,
    data=data,
    model=_model(task, data, size=size, extras=chosen.extras),
    attention_noise=_attention_noise(chosen),
    privacy=_privacy(chosen),
    optimizer=config.OptimizerConfig(learning_rate=5e-3),
    train=config.TrainConfig(
      # A text has four times as many tokens as a picture, and a digit is both
      # and a recording: half the steps bring their cells nearer to the others'.
      num_steps=150 if task in ("reviews", "digits") else 300,
      expected_batch_size=128,
    ),
    audit=config.AuditConfig(num_models=6, num_records=2000, robustness=True),
    perf=config.PerfConfig(microbatch_size=32),
  )
  return experiment if size == "cpu" else _full(experiment, task)


def _model(
  task: str, data: config.DataConfig, *, size: str, extras: bool
) -> config.ModelConfig:
  """The network of a task."""
  decoder = dataclasses.replace(
    config.llama_tiny(vocab_size=data.vocab_size),
    embed_dim=64,
    num_heads=4,
    num_kv_heads=4,
    mlp_dim=128,
    max_seq_len=128,
  )
  if size == "full":
    decoder = dataclasses.replace(
      presets.llama_7b(),
      remat=True,
      compute_dtype=config.ComputeDtype.BFLOAT16,
      max_seq_len=decoder.max_seq_len,  # That of the records.
    )
  is_multimodal = task in _WITH_IMAGE and task in _WITH_AUDIO
  return config.ModelConfig(
    decoder=decoder,
    image=config.ImageStemConfig(channels=(16, 32, 32), strides=(2, 2, 2))
    if task in _WITH_IMAGE
    else None,
    audio=config.AudioStemConfig(frames_per_token=4)
    if task in _WITH_AUDIO
    else None,
    modality_dropout=0.1 if extras and is_multimodal else 0.0,
  )


def _attention_noise(row: _Row) -> config.AttentionNoiseConfig:
  """Noise in the scores, and the term that holds predictions together."""
  if not row.attention_noise:
    return config.AttentionNoiseConfig()
  return config.AttentionNoiseConfig(
    stddev=row.stddev, consistency_weight=_CONSISTENCY_WEIGHT
  )


def _privacy(row: _Row) -> config.PrivacyConfig:
  """The mechanism; without a guarantee where a part of it is missing."""
  return config.PrivacyConfig(
    enabled=row.dp_noise or row.clipping,
    epsilon=row.epsilon,
    delta=_DELTA,
    l2_clip_norm=_CLIP_NORM,
    noise=row.dp_noise,
    clipping=config.Clipping.PER_EXAMPLE
    if row.clipping
    else config.Clipping.NONE,
  )


def _full(
  experiment: config.ExperimentConfig, task: str
) -> config.ExperimentConfig:
  """The same with Llama-7B's decoder and all records, two models at a time."""
  batch_size, num_examples = _FULL[task]
  return dataclasses.replace(
    experiment,
    optimizer=config.OptimizerConfig(learning_rate=1e-4),
    train=config.TrainConfig(num_steps=1000, expected_batch_size=batch_size),
    mesh=config.MeshConfig(data=1, fsdp=-1, tensor=4),
    audit=config.AuditConfig(num_models=6, models_at_once=2, robustness=True),
    account=config.AccountConfig(num_examples=num_examples),
  )
