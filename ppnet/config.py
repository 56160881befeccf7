"""Every knob of an experiment, as slotted dataclasses, and what is valid.

A file in `configs/` returns one `ExperimentConfig`; flags override any field
(`--config.privacy.epsilon=3`); `validate` runs after the flags, because
`ml_collections` sets fields without calling `__post_init__`.

The dataclasses are slotted (a misspelt field is an error) and not frozen (flags
write to them). This module imports neither JAX nor NumPy.
"""

import dataclasses
import enum

from ppnet import (
  audit_config,
  config_attention,
  data_config,
  mesh_config,
  model_config,
  optimizer_config,
  table_config,
)
from ppnet.core import checks

# What concerns attention has a file of its own, and its names here.
NoiseMode = config_attention.NoiseMode
NoiseGenerator = config_attention.NoiseGenerator
AttentionImplementation = config_attention.AttentionImplementation
AttentionNoiseConfig = config_attention.AttentionNoiseConfig
PrivateCutConfig = config_attention.PrivateCutConfig
# The shapes of networks, in a file of their own; these are their names.
ComputeDtype = model_config.ComputeDtype
RopeScalingConfig = model_config.RopeScalingConfig
LoraConfig = model_config.LoraConfig
LlamaConfig = model_config.LlamaConfig
LinearConfig = model_config.LinearConfig
Activation = model_config.Activation
TemperedSigmoidConfig = model_config.TemperedSigmoidConfig
WordsConfig = model_config.WordsConfig
ImageStemConfig = model_config.ImageStemConfig
PatchStemConfig = model_config.PatchStemConfig
AudioStemConfig = model_config.AudioStemConfig
ModelConfig = model_config.ModelConfig
llama_tiny = model_config.llama_tiny
PROJECTIONS = model_config.PROJECTIONS
is_measured = model_config.is_measured
# What concerns the optimizer, audits, tables, devices, and the data, likewise.
OptimizerName = optimizer_config.OptimizerName
Schedule = optimizer_config.Schedule
OptimizerConfig = optimizer_config.OptimizerConfig
AuditConfig = audit_config.AuditConfig
TableSubject = table_config.TableSubject
Tuning = table_config.Tuning
TableConfig = table_config.TableConfig
Strategy = mesh_config.Strategy
MeshConfig = mesh_config.MeshConfig
MESH_AXES = mesh_config.AXES
MODALITIES = data_config.MODALITIES
Source = data_config.Source
SOURCE_PATHS = data_config.PATHS
ColumnsConfig = data_config.ColumnsConfig
ReviewLabel = data_config.ReviewLabel
Statistics = data_config.Statistics
Task = data_config.Task
TokenizerKind = data_config.TokenizerKind
BadRecord = data_config.BadRecord
AudioFeature = data_config.AudioFeature
AudioConfig = data_config.AudioConfig
DataConfig = data_config.DataConfig
num_audio_frames = data_config.num_audio_frames
is_augmented = data_config.is_augmented


class Job(enum.Enum):
  """What one run of `ppnet.main` does."""

  TRAIN = "train"
  EVALUATE = "evaluate"
  AUDIT = "audit"
  TABLE = "table"
  COMPILE = "compile"
  PREPARE = "prepare"
  BENCHMARK = "benchmark"
  ACCOUNT = "account"
  GENERATE = "generate"


class Clipping(enum.Enum):
  """What is clipped. Only PER_EXAMPLE bounds the sensitivity."""

  PER_EXAMPLE = "per_example"
  BATCH = "batch"  # Ablation: clips the batch gradient. No guarantee.
  NONE = "none"  # Ablation. No guarantee.


class ClipRule(enum.Enum):
  """How a gradient g of one privacy unit becomes its contribution."""

  CLIP = "clip"  # g min(1, C / |g|)
  NORMALIZE = "normalize"  # g C / (|g| + stabilizer), "automatic clipping".


class ClipScope(enum.Enum):
  """What one norm is taken over."""

  FLAT = "flat"  # All parameters: one bound C.
  PER_LAYER = "per_layer"  # Each layer's each parameter: a bound of its own.


class UnitReduction(enum.Enum):
  """How the gradients of a unit's rows become the gradient of the unit."""

  SUM = "sum"  # Of a user's records.
  MEAN = "mean"  # Over the views of one record.


class Engine(enum.Enum):
  """How the clipped sum is computed. Every engine gives the same sum."""

  VMAP = "vmap"  # Any loss function; the reference.
  GHOST = "ghost"  # Norms by one pullback, the sum by a second one. float32.
  BOOKKEEPING = "bookkeeping"  # One backward pass; keeps its cotangents.
  AUTO = "auto"  # The one of these that suits the shapes; the record says why.


class Sampler(enum.Enum):
  """How a step's batch is drawn; each is accounted for as what it is."""

  POISSON = "poisson"  # Varying size, nothing cut.
  TRUNCATED_POISSON = "truncated_poisson"  # At most `privacy.max_batch_size`.
  BALLS_IN_BINS = "balls_in_bins"  # Everybody once a cycle, at random.
  SHUFFLE = "shuffle"  # Fixed size; no amplification is claimed.
  FULL_BATCH = "full_batch"


class NoiseMechanism(enum.Enum):
  """How the noise of one step depends on that of the others."""

  INDEPENDENT = "independent"
  BANDED = "banded"  # Correlated over steps; POISSON batches of groups in turn.


class Accountant(enum.Enum):
  """How privacy loss composes over steps."""

  PLD = "pld"
  RDP = "rdp"


class NeighboringRelation(enum.Enum):
  """Which data sets count as neighbours in the guarantee."""

  ADD_OR_REMOVE_ONE = "add_or_remove_one"
  REPLACE_ONE = "replace_one"


class PrivacyUnit(enum.Enum):
  """What one unit of protection is."""

  EXAMPLE = "example"
  USER = "user"
  PACKED_ROW = "packed_row"  # Rows of whole records: less than a record.


class BenchSubject(enum.Enum):
  """What a BENCHMARK job measures."""

  ENGINES = "engines"  # The clipped sum, by each engine and by other libraries.
  PIPELINE = "pipeline"  # Records per second of the data pipelines.
  ATTENTION = "attention"  # Attention with noise, by kernels and reference.
  SHADOWS = "shadows"  # Models trained side by side, and in runs of their own.
  RECORD_PEERS = "record_peers"  # Other libraries on a record's features.


@dataclasses.dataclass(slots=True, kw_only=True)
class PrivacyConfig:
  """Everything the guarantee depends on, and nothing else.

  Exactly one of `epsilon` (then the noise is calibrated) and `noise_multiplier`
  (then epsilon is computed) is set.

  Attributes:
    enabled: False trains the same loop without clipping and without noise.
    epsilon: target, reached from below.
    delta: probability that the guarantee fails; keep it below 1/N.
    noise_multiplier: noise standard deviation over sensitivity.
    l2_clip_norm: C, the bound on each privacy unit's gradient; where it follows
      a quantile, the first one.
    clipping: PER_EXAMPLE, or a named ablation without a guarantee.
    clip_rule: CLIP, or NORMALIZE, which needs no well-chosen C.
    clip_scope: FLAT, or PER_LAYER with C shared evenly among the layers'
      parameters.
    normalize_stabilizer: gamma of NORMALIZE, added to each norm.
    clip_quantile: the share of units that C is to leave unclipped: it follows
      them, and a part of the budget pays for a noisy count. None keeps C.
    clip_learning_rate: how fast log C follows.
    clip_count_stddev: of the noise on that count, in units; None is a twentieth
      of `train.expected_batch_size`.
    noise: False is an ablation without a guarantee.
    sampler: how batches are drawn; the accountant is told the same.
    max_batch_size: examples that TRUNCATED_POISSON keeps at most; None for the
      other samplers.
    noise_mechanism: INDEPENDENT, or BANDED with `num_bands`.
    num_bands: steps over which BANDED noise is correlated, and groups of
      examples that take turns; None for INDEPENDENT.
    accountant: PLD (tight) or RDP.
    neighboring_relation: which data sets are neighbours.
    unit: what is protected: a record, all records of a user, or a row that
      several whole records were packed into. Batch sizes, microbatch sizes and
      N count these units.
    max_records_per_user: records of one sampled user that a step takes.
    allow_large_delta: accept delta >= 1/N.
    noise_seed: None draws the root from the operating system's entropy. A seed
      makes a run repeatable and voids the guarantee towards whoever knows it.
    sampler_seed: likewise for the batches.
  """

  enabled: bool = True
  epsilon: float | None = 8.0
  delta: float = 1e-5
  noise_multiplier: float | None = None
  l2_clip_norm: float = 1.0
  clipping: Clipping = Clipping.PER_EXAMPLE
  clip_rule: ClipRule = ClipRule.CLIP
  clip_scope: ClipScope = ClipScope.FLAT
  normalize_stabilizer: float = 0.01
  clip_quantile: float | None = None
  clip_learning_rate: float = 0.2
  clip_count_stddev: float | None = None
  noise: bool = True
  sampler: Sampler = Sampler.POISSON
  max_batch_size: int | None = None
  noise_mechanism: NoiseMechanism = NoiseMechanism.INDEPENDENT
  num_bands: int | None = None
  accountant: Accountant = Accountant.PLD
  neighboring_relation: NeighboringRelation = (
    NeighboringRelation.ADD_OR_REMOVE_ONE
  )
  unit: PrivacyUnit = PrivacyUnit.EXAMPLE
  max_records_per_user: int = 1
  allow_large_delta: bool = False
  noise_seed: int | None = None
  sampler_seed: int | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class TrainConfig:
  """Length and rhythm of training.

  Attributes:
    num_steps: optimizer steps.
    trained: patterns of the names of what is trained, each a regular expression
      for a whole name such as "decoder/layers/mlp/up_proj/kernel"; the rest is
      frozen, in bfloat16. None given trains everything, or, where the decoder
      has adapters, everything but the decoder's own parameters.
    expected_batch_size: public divisor of the noisy sum, in privacy units; with
      Poisson sampling the realised size varies around it.
    views_per_example: views of each drawn record, whose mean gradient is
      clipped (augmentation multiplicity). They differ by what the random
      transformations drew, and by their attention noise.
    eval_every_steps: evaluate on the test split every so many steps.
    checkpoint_every_steps: save every so many steps, and at the end.
    checkpoints_to_keep: older checkpoints are deleted.
  """

  num_steps: int = 100
  trained: tuple[str, ...] = ()
  expected_batch_size: int = 256
  views_per_example: int = 1
  eval_every_steps: int = 20
  checkpoint_every_steps: int = 20
  checkpoints_to_keep: int = 2


@dataclasses.dataclass(slots=True, kw_only=True)
class PerfConfig:
  """What may change speed and memory but neither the result nor the guarantee.

  Attributes:
    engine: how the clipped sum is computed.
    microbatch_size: privacy units per compiled call.
    gather_weights: parameters that are split along the axes of the batch are
      brought together once per step, in the compute dtype, and not in every
      microbatch; each device then holds them whole for as long.
    data_threads: threads that decode and batch.
    data_workers: processes that do, each with so many threads; 0: this one.
    prefetch_steps: steps of data kept ready.
    stall_secs: what waits longer is reported: for data, the devices, a
      checkpoint, an evaluation's batch or another process.
  """

  engine: Engine = Engine.AUTO
  microbatch_size: int = 64
  gather_weights: bool = False
  data_threads: int = 1
  data_workers: int = 0
  prefetch_steps: int = 2
  stall_secs: float = 300.0


class CompileSearch(enum.Enum):
  """What else a COMPILE job compiles, to recommend it."""

  NONE = "none"
  MICROBATCH = "microbatch"  # Up to three more: the largest that fits.
  ENGINE = "engine"  # That of every engine; the shortest step.
  LAYOUT = "layout"  # Weights gathered once or not, twice the tensor ways.


@dataclasses.dataclass(slots=True, kw_only=True)
class AccountConfig:
  """What an ACCOUNT job is asked; no other job reads it.

  Attributes:
    num_examples: size of the training set; None takes it from the prepared
      data.
  """

  num_examples: int | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class BenchConfig:
  """What a BENCHMARK job measures, and how often.

  Attributes:
    subject: what is measured.
    cases: names with commas between them; see `ppnet.bench`. "own" is
      this configuration's own model and data, in one microbatch.
    rounds: timed executions of each row, taken in turn; of RECORD_PEERS the
      seeds, from `seed` on.
    peers: measure other libraries as well.
  """

  subject: BenchSubject = BenchSubject.ENGINES
  cases: str = "own"
  rounds: int = 10
  peers: bool = True


@dataclasses.dataclass(slots=True, kw_only=True)
class GenerateConfig:
  """What the GENERATE job continues, and how.

  Attributes:
    weights: a Hugging Face directory of a Llama and its `tokenizer.model`;
      empty takes the workdir's newest checkpoint.
    prompts: texts to continue; none continues records of the test split, with
      their pictures and sounds, which needs a checkpoint of this experiment.
    num_records: how many of them.
    batch_size: prompts that are continued at once.
    max_prompt_len: longest prompt, in tokens.
    max_new_tokens: at most this many new ones.
    temperature: 0 takes the most likely token.
    top_k: only this many of the most likely tokens; 0 is all.
    top_p: of those, the fewest that have this probability together.
  """

  weights: str = ""
  prompts: tuple[str, ...] = ()
  num_records: int = 4
  batch_size: int = 4
  max_prompt_len: int = 64
  max_new_tokens: int = 16
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0


@dataclasses.dataclass(slots=True, kw_only=True)
class ExperimentConfig:
  """One experiment.

  Attributes:
    name: for people; also the default folder's name.
    job: what to do.
    topology: the TPU pod that COMPILE compiles for, as "v5e:8x8"; no other job
      reads it.
    compile_search: what COMPILE tries beside what is configured; no other job
      reads it.
    tuning: on what data this experiment's hyper-parameters are chosen; nothing
      depends on it but what tables and sweeps say of it.
    seed: fixes initial parameters and attention noise; never the DP noise or
      the sampler, which `privacy` seeds.
    data: see `DataConfig`.
    model: see `ModelConfig`.
    attention_noise: see `AttentionNoiseConfig`.
    privacy: see `PrivacyConfig`.
    optimizer: see `OptimizerConfig`.
    train: see `TrainConfig`.
    mesh: see `MeshConfig`.
    perf: see `PerfConfig`.
    account: see `AccountConfig`.
    bench: see `BenchConfig`.
    generate: see `GenerateConfig`.
    audit: see `AuditConfig`; no other job reads it.
    table: see `TableConfig`; no other job reads it.
  """

  name: str = "experiment"
  job: Job = Job.TRAIN
  topology: str = ""
  compile_search: CompileSearch = CompileSearch.MICROBATCH
  tuning: Tuning = Tuning.NONE
  seed: int = 0
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  attention_noise: AttentionNoiseConfig = dataclasses.field(
    default_factory=AttentionNoiseConfig
  )
  privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=OptimizerConfig
  )
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  perf: PerfConfig = dataclasses.field(default_factory=PerfConfig)
  account: AccountConfig = dataclasses.field(default_factory=AccountConfig)
  bench: BenchConfig = dataclasses.field(default_factory=BenchConfig)
  generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)
  audit: AuditConfig = dataclasses.field(default_factory=AuditConfig)
  table: TableConfig = dataclasses.field(default_factory=TableConfig)


def num_media_tokens(config: ExperimentConfig) -> dict[str, int]:
  """Tokens that one item of each modality with a stem takes in the decoder.

  One each for a linear model, which has no stems.
  """
  counts = {}
  if config.model.linear is not None:
    return {
      name: 1 for name in MODALITIES if getattr(config.model, name) is not None
    }
  if config.model.image is not None:
    counts["image"] = config.model.image.num_tokens(config.data.image_size)
  if config.model.audio is not None:
    frames = num_audio_frames(config.data.audio)
    counts["audio"] = -(-frames // config.model.audio.frames_per_token)
  return counts


def validate(config: ExperimentConfig) -> None:
  """Checks a whole configuration after the flags were applied.

  What needs the data (a batch larger than the data set, delta against 1/N) is
  checked by `privacy.mechanism.build`.

  Raises:
    ValueError: names the field, its value, what was expected and what to do.
  """
  _validate_privacy(config.privacy)
  _validate_account(config.account)
  audit_config.validate(config.audit)
  table_config.validate(config.table)
  if config.job is Job.TABLE:
    checks.positive(
      "A cell's shadow models are its repeated runs.",
      **{"audit.num_models": config.audit.num_models},
    )
  _validate_units(config)
  data_config.validate(
    config.data, max_seq_len=config.model.decoder.max_seq_len
  )
  _validate_model(config)
  _validate_training(config)
  mesh_config.validate(config.mesh)


def _validate_account(account: AccountConfig) -> None:
  if account.num_examples is not None:
    checks.positive(**{"account.num_examples": account.num_examples})


def _validate_privacy(privacy: PrivacyConfig) -> None:
  checks.in_open_unit_interval(
    "delta is the probability that the guarantee fails; keep it below 1/N.",
    **{"privacy.delta": privacy.delta},
  )
  checks.positive(**{"privacy.l2_clip_norm": privacy.l2_clip_norm})
  if (privacy.epsilon is None) == (privacy.noise_multiplier is None):
    checks.fail(
      "exactly one of privacy.epsilon and privacy.noise_multiplier",
      "Set the other one to none, as in --config.privacy.epsilon=none.",
      **{
        "privacy.epsilon": privacy.epsilon,
        "privacy.noise_multiplier": privacy.noise_multiplier,
      },
    )
  if privacy.epsilon is not None:
    checks.positive(
      "For a run without a guarantee use --config.privacy.enabled=false.",
      **{"privacy.epsilon": privacy.epsilon},
    )
  if privacy.noise_multiplier is not None:
    checks.positive(
      "For a run without noise use --config.privacy.noise=false.",
      **{"privacy.noise_multiplier": privacy.noise_multiplier},
    )
  if (privacy.sampler is Sampler.TRUNCATED_POISSON) != (
    privacy.max_batch_size is not None
  ):
    checks.fail(
      "privacy.max_batch_size with privacy.sampler=TRUNCATED_POISSON, and with"
      " no other",
      "POISSON cuts nothing; set it to none there.",
      **{
        "privacy.sampler": privacy.sampler.name,
        "privacy.max_batch_size": privacy.max_batch_size,
      },
    )
  if privacy.max_batch_size is not None:
    checks.positive(**{"privacy.max_batch_size": privacy.max_batch_size})
  checks.positive(
    **{
      "privacy.normalize_stabilizer": privacy.normalize_stabilizer,
      "privacy.clip_learning_rate": privacy.clip_learning_rate,
      "privacy.max_records_per_user": privacy.max_records_per_user,
    }
  )
  if privacy.clip_quantile is not None:
    checks.in_open_unit_interval(
      **{"privacy.clip_quantile": privacy.clip_quantile}
    )
  if privacy.clip_count_stddev is not None:
    checks.positive(**{"privacy.clip_count_stddev": privacy.clip_count_stddev})

  is_banded = privacy.noise_mechanism is NoiseMechanism.BANDED
  if is_banded != (privacy.num_bands is not None):
    checks.fail(
      "privacy.num_bands with privacy.noise_mechanism=BANDED, and only there",
      **{
        "privacy.noise_mechanism": privacy.noise_mechanism.name,
        "privacy.num_bands": privacy.num_bands,
      },
    )


def _validate_units(config: ExperimentConfig) -> None:
  views = config.train.views_per_example
  checks.positive(**{"train.views_per_example": views})
  has_users = config.privacy.unit is PrivacyUnit.USER
  told_apart = (
    config.attention_noise.stddev
    or config.model.modality_dropout
    or data_config.is_augmented(config.data)
  )
  if views > 1 and not told_apart:
    checks.fail(
      "something that tells the views of an example apart",
      "Equal views cost their number and change nothing. Put an augmentation"
      " into data.image_transforms or data.audio_transforms, set"
      " --config.attention_noise.stddev, or take one view.",
      **{"train.views_per_example": views},
    )
  data_config.validate_users(config.data, has_users=has_users)
  if config.privacy.unit is PrivacyUnit.PACKED_ROW and (
    config.data.task is Task.CLASSIFY or views > 1
  ):
    checks.fail(
      "data.task ANSWER or CAUSAL and one view, for privacy.unit=PACKED_ROW",
      "A packed row has several answers.",
      **{
        "data.task": config.data.task.name,
        "train.views_per_example": views,
      },
    )
  if not has_users and config.privacy.max_records_per_user != 1:
    checks.fail(
      "privacy.unit=USER with privacy.max_records_per_user",
      max_records_per_user=config.privacy.max_records_per_user,
    )


def _validate_model(config: ExperimentConfig) -> None:
  decoder = config.model.decoder
  checks.positive(
    **{
      f"model.decoder.{name}": getattr(decoder, name)
      for name in (
        "vocab_size",
        "embed_dim",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "mlp_dim",
        "max_seq_len",
        "rope_theta",
        "rms_norm_eps",
      )
    }
  )
  if decoder.num_heads % decoder.num_kv_heads:
    checks.fail(
      "model.decoder.num_heads to be a multiple of num_kv_heads",
      num_heads=decoder.num_heads,
      num_kv_heads=decoder.num_kv_heads,
    )
  if decoder.head_dim % 2:
    checks.fail(
      "an even model.decoder.head_dim",
      "Rotary embeddings turn pairs of features.",
      head_dim=decoder.head_dim,
    )
  model_config.validate_options(decoder)
  model_config.validate_first_weights(config.model)
  model_config.validate_linear(
    config.model, tokenizer=config.data.tokenizer.name
  )
  _validate_centre(config)
  if decoder.vocab_size < config.data.vocab_size:
    checks.fail(
      "model.decoder.vocab_size >= data.vocab_size",
      "The decoder must have a row for every token.",
      **{
        "model.decoder.vocab_size": decoder.vocab_size,
        "data.vocab_size": config.data.vocab_size,
      },
    )
  model_config.validate_stems(config.model, image_size=config.data.image_size)
  config_attention.validate(
    noise=config.attention_noise,
    private_cut=config.model.private_cut,
    noise_layers=decoder.noise_layers,
    num_layers=decoder.num_layers,
  )


def _validate_centre(config: ExperimentConfig) -> None:
  """The mean is that of unit vectors, each of which must count whole."""
  linear, privacy = config.model.linear, config.privacy
  if linear is None or not privacy.enabled:
    return
  if not is_measured(linear):
    return
  if privacy.l2_clip_norm < 1 or privacy.clip_scope is not ClipScope.FLAT:
    checks.fail(
      "privacy.l2_clip_norm >= 1 and clip_scope FLAT with model.linear.centre"
      " or model.linear.rarity_power",
      "Raise model.linear.feature_norm instead of lowering the clip norm.",
      **{
        "privacy.l2_clip_norm": privacy.l2_clip_norm,
        "privacy.clip_scope": privacy.clip_scope.name,
      },
    )


def _validate_training(config: ExperimentConfig) -> None:
  train = config.train
  checks.positive(
    **{
      "train.num_steps": train.num_steps,
      "train.expected_batch_size": train.expected_batch_size,
      "train.eval_every_steps": train.eval_every_steps,
      "train.checkpoint_every_steps": train.checkpoint_every_steps,
      "train.checkpoints_to_keep": train.checkpoints_to_keep,
      "perf.microbatch_size": config.perf.microbatch_size,
      "perf.data_threads": config.perf.data_threads,
      "perf.prefetch_steps": config.perf.prefetch_steps,
      "perf.stall_secs": config.perf.stall_secs,
      "bench.rounds": config.bench.rounds,
    }
  )
  checks.non_negative(**{"perf.data_workers": config.perf.data_workers})
  optimizer_config.validate(config.optimizer)
