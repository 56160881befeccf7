"""Fashion-MNIST, ten kinds of clothes in 28 x 28 grey pixels, privately.

  bash launch/local.sh --config=configs/fashion_mnist.py:/data/fashion-mnist

The argument is the folder with the four IDX files, plain or .gz, as
https://github.com/zalandoresearch/fashion-mnist has them. MNIST comes in the
same form: give its folder, and
--config.data.class_names='("0","1","2","3","4","5","6","7","8","9")'.

Claim: example-level (3, 1e-5)-differential privacy, add-or-remove-one.
"""

from ppnet import config

# An IDX file does not name its classes; this is the publisher's order.
CLASS_NAMES = (
  "T-shirt/top",
  "Trouser",
  "Pullover",
  "Dress",
  "Coat",
  "Sandal",
  "Shirt",
  "Sneaker",
  "Bag",
  "Ankle boot",
)


def get_config(path: str = "/data/fashion-mnist") -> config.ExperimentConfig:
  """A small private classifier of the pictures in `path`."""
  return config.ExperimentConfig(
    name="fashion_mnist",
    data=config.DataConfig(
      source=config.Source.IDX,
      path=path,
      class_names=CLASS_NAMES,
      prompt="What is in the picture?",
      vocab_size=128,
      image_size=28,
      image_channels=1,
    ),
    model=config.ModelConfig(
      decoder=config.llama_tiny(vocab_size=128),
      image=config.ImageStemConfig(channels=(16, 32, 32), strides=(2, 2, 2)),
      audio=None,
    ),
    privacy=config.PrivacyConfig(epsilon=3.0, delta=1e-5, l2_clip_norm=1.0),
    optimizer=config.OptimizerConfig(learning_rate=5e-3),
    train=config.TrainConfig(
      num_steps=200,
      expected_batch_size=2048,
      eval_every_steps=50,
      checkpoint_every_steps=50,
    ),
    perf=config.PerfConfig(microbatch_size=128),
  )
