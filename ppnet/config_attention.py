"""What attention computes and what noise it gets: enums, dataclasses, checks.

`ppnet.config` gives all of it its public names.
"""

import dataclasses
import enum

from ppnet.core import checks


class NoiseMode(enum.Enum):
  """Where attention noise enters."""

  SCORES = "scores"  # softmax(QK'/sqrt(d) + stddev N) V
  WEIGHTS = "weights"  # renormalised (softmax(QK'/sqrt(d)) + stddev N)_+ V


class AttentionImplementation(enum.Enum):
  """Which code computes attention; all of them compute the same values."""

  REFERENCE = "reference"  # XLA, the noise an array [B, N, T, S]. The oracle.
  TPU = "tpu"  # Pallas Mosaic, O(T) memory; interpreted on other devices.
  GPU = "gpu"  # Pallas Triton, likewise.


class NoiseGenerator(enum.Enum):
  """What attention noise is drawn with."""

  PORTABLE = "portable"  # A hash: the same bits on every device.
  HARDWARE = "hardware"  # A TPU's own generator: cheaper, on TPU kernels only.


@dataclasses.dataclass(slots=True, kw_only=True)
class AttentionNoiseConfig:
  """Noise inside attention: a regulariser. It carries no privacy guarantee.

  Attributes:
    stddev: standard deviation; 0 turns the mechanism off.
    mode: SCORES or WEIGHTS.
    generator: PORTABLE, or HARDWARE on TPU.
    at_evaluation: keep the noise on when evaluating.
    consistency_weight: weight of KL(clean || noisy prediction) in the loss;
      above 0 it costs a second forward pass.
  """

  stddev: float = 0.0
  mode: NoiseMode = NoiseMode.SCORES
  generator: NoiseGenerator = NoiseGenerator.PORTABLE
  at_evaluation: bool = False
  consistency_weight: float = 0.0


@dataclasses.dataclass(slots=True, kw_only=True)
class PrivateCutConfig:
  """A hidden state that is clipped and noised: privacy of one input.

  Every output is (epsilon, delta)-differentially private with respect to its
  own input, all tokens together; see `privacy.input_privacy`. It costs accuracy
  and is no part of the training set's guarantee.

  Attributes:
    layer: decoder layer, counted from 0, whose input is cut; None cuts nothing.
    l2_clip_norm: bound on one example's state over all its tokens.
    epsilon: of one output.
    delta: of one output.
    noise_seed: None draws the root from the operating system's entropy. A seed
      makes a run repeatable and voids the guarantee towards whoever knows it.
  """

  layer: int | None = None
  l2_clip_norm: float = 1.0
  epsilon: float = 8.0
  delta: float = 1e-5
  noise_seed: int | None = None


def validate(
  *,
  noise: AttentionNoiseConfig,
  private_cut: PrivateCutConfig,
  noise_layers: tuple[int, ...],
  num_layers: int,
) -> None:
  """Checks all of it; part of `ppnet.config.validate`.

  Args:
    noise: `attention_noise`.
    private_cut: `model.private_cut`.
    noise_layers: `model.decoder.noise_layers`.
    num_layers: `model.decoder.num_layers`.

  Raises:
    ValueError: names the field, its value, what was expected and what to do.
  """
  for layer in noise_layers:
    if not 0 <= layer < num_layers:
      checks.fail(
        "layers of the decoder in model.decoder.noise_layers, counted from 0",
        noise_layers=noise_layers,
        num_layers=num_layers,
      )
  cut = private_cut
  if cut.layer is not None:
    if not 0 <= cut.layer < num_layers:
      checks.fail(
        "model.private_cut.layer to be a layer of the decoder, counted from 0",
        layer=cut.layer,
        num_layers=num_layers,
      )
    checks.positive(
      **{
        "model.private_cut.l2_clip_norm": cut.l2_clip_norm,
        "model.private_cut.epsilon": cut.epsilon,
      }
    )
    checks.in_open_unit_interval(
      "delta is the probability that the guarantee fails.",
      **{"model.private_cut.delta": cut.delta},
    )
  checks.non_negative(
    **{
      "attention_noise.stddev": noise.stddev,
      "attention_noise.consistency_weight": noise.consistency_weight,
    }
  )
