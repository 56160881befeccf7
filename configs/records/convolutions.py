r"""What each trick of private convolutions is worth, one at a time.

  python -m ppnet.main --config=configs/records/convolutions.py:tanh,groups \
    --config.data.path=/data/fashion-mnist --workdir=DIR

Fashion-MNIST, a small network that learns its own features: the convolutions
and the decoder of `configs/fashion_mnist.py` with its learning rate and clip
norm, the same for all rows and chosen for none; 200 steps of 1024 expected
pictures. It is far from `fashion_mnist.py` beside this file and is not meant to
reach it: an option of `config.ImageStemConfig` can be measured on it in a few
minutes of one core.

The argument names tricks, with commas: `base` (none), `tanh`, `tempered`,
`groups`, `standardised`, `views`, or `all`, which is tanh, groups and
standardised. RECORDS.md has what came of it.

Claim: example-level (3, 1e-5)-differential privacy, add-or-remove-one.
"""

import dataclasses
import pathlib
import runpy

from ppnet import config
from ppnet.core import checks
from ppnet.data import augment_image, image

_FASHION_MNIST = runpy.run_path(
  str(pathlib.Path(__file__).parents[1] / "fashion_mnist.py")
)["get_config"]
_NUM_STEPS = 200
_TEMPERED = config.TemperedSigmoidConfig(
  scale=1.58, temperature=3.0, offset=0.71
)
_STEM: dict[str, dict[str, object]] = {
  "base": {},
  "tanh": {"activation": config.Activation.TANH},
  "tempered": {
    "activation": config.Activation.TEMPERED_SIGMOID,
    "tempered_sigmoid": _TEMPERED,
  },
  "groups": {"num_groups": 4},
  "standardised": {"weight_standardisation": True},
  "all": {
    "activation": config.Activation.TANH,
    "num_groups": 4,
    "weight_standardisation": True,
  },
  "views": {},
}
_VIEWS = (
  image.Decode(image_size=28, image_channels=1, as_uint8=True),
  augment_image.Flip(),
  augment_image.RandomCrop(size=28, padding=2),
  image.CenterCrop(size=28),
  image.MinMax(),
  image.ZScore(mean=0.5, std=0.5),  # As without views.
)


def get_config(argument: str = "base") -> config.ExperimentConfig:
  """The run with the tricks that the argument names."""
  tricks = argument.split(",")
  for trick in tricks:
    if trick not in _STEM:
      checks.fail(
        f"tricks among {tuple(_STEM)}, with commas",
        checks.did_you_mean(trick, _STEM).strip(),
        argument=argument,
      )
  experiment = _FASHION_MNIST("/data/fashion-mnist")
  changes: dict[str, object] = {}
  for trick in tricks:
    changes |= _STEM[trick]
  experiment.name = f"convolutions-{'-'.join(tricks)}"
  experiment.data.prompt = ""
  experiment.data.store_fixed = True
  assert experiment.model.image is not None
  experiment.model.image = dataclasses.replace(
    experiment.model.image, **changes
  )
  experiment.train = config.TrainConfig(
    num_steps=_NUM_STEPS,
    expected_batch_size=1024,
    eval_every_steps=_NUM_STEPS,
    checkpoint_every_steps=_NUM_STEPS,
  )
  if "views" in tricks:
    experiment.data.image_transforms = _VIEWS
    experiment.train.views_per_example = 4
  return experiment
