"""Photographs of ten kinds of clothes, privately.

  bash launch/local.sh --config=configs/clothing_photos.py:/data/clothing.zip

The argument is https://github.com/alexeygrigorev/clothing-dataset-small, as a
folder or as a zip with train/, validation/ and test/ at its top; validation is
left out.

Claim: example-level (8, 1e-5)-differential privacy, add-or-remove-one. Some
three thousand photographs are few: expect a weak model.
"""

from ppnet import config


def get_config(path: str = "/data/clothing.zip") -> config.ExperimentConfig:
  """A small private classifier of the photographs in `path`."""
  return config.ExperimentConfig(
    name="clothing_photos",
    data=config.DataConfig(
      source=config.Source.IMAGE_FOLDER,
      path=path,
      prompt="What is in the picture?",
      vocab_size=128,
      image_size=32,
      image_channels=3,
    ),
    model=config.ModelConfig(
      decoder=config.llama_tiny(vocab_size=128),
      image=config.ImageStemConfig(channels=(16, 32, 32), strides=(2, 2, 2)),
      audio=None,
    ),
    privacy=config.PrivacyConfig(epsilon=8.0, delta=1e-5, l2_clip_norm=1.0),
    optimizer=config.OptimizerConfig(learning_rate=5e-3),
    train=config.TrainConfig(
      num_steps=150,
      expected_batch_size=1024,
      eval_every_steps=25,
      checkpoint_every_steps=25,
    ),
    perf=config.PerfConfig(microbatch_size=64),
  )
