"""Your own pictures: a folder with train/<class>/* and test/<class>/*.

  bash launch/local.sh --config=configs/image_folder.py:/data/clothes

Any number of classes. Pictures are made 32 pixels square and in colour; raise
`data.image_size`, the stem and the decoder for larger ones. With a few thousand
pictures expect a weak model: differential privacy needs data.
"""

from ppnet import config


def get_config(path: str = "images") -> config.ExperimentConfig:
  """A small private classifier of the pictures in `path`."""
  return config.ExperimentConfig(
    name="image_folder",
    data=config.DataConfig(
      source=config.Source.IMAGE_FOLDER,
      path=path,
      prompt="What is in the picture?",
      vocab_size=256,
      image_size=32,
      image_channels=3,
    ),
    model=config.ModelConfig(
      decoder=config.llama_tiny(vocab_size=256),
      image=config.ImageStemConfig(channels=(16, 32, 32), strides=(2, 2, 2)),
      audio=None,
    ),
    attention_noise=config.AttentionNoiseConfig(stddev=0.1),
    privacy=config.PrivacyConfig(epsilon=8.0, delta=1e-5),
    optimizer=config.OptimizerConfig(learning_rate=5e-3),
    train=config.TrainConfig(
      num_steps=150,
      expected_batch_size=1024,
      eval_every_steps=15,
      checkpoint_every_steps=30,
    ),
    perf=config.PerfConfig(microbatch_size=64),
  )
