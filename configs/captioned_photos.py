"""Says what a photograph shows: COCO captions, privately.

  bash launch/local.sh --config=configs/captioned_photos.py:/data/coco

The argument is COCO's own folder, with annotations/, train2017 and val2017 in
it, or a folder or zip with captions.jsonl and images/. A record is a photograph
and its first caption. For all five, set --config.data.captions_per_image=5,
--config.privacy.unit=user and --config.privacy.max_records_per_user=5: then the
photograph is the user.

Claim: example-level (8, 1e-5)-differential privacy, add-or-remove-one. The unit
is a photograph. The batch is small enough for some sixty of them; for all of
COCO set --config.train.expected_batch_size=2048.
"""

import dataclasses

from ppnet import config


def get_config(path: str = "/data/coco") -> config.ExperimentConfig:
  """A small private model that writes captions."""
  return config.ExperimentConfig(
    name="captioned_photos",
    data=config.DataConfig(
      source=config.Source.COCO_CAPTIONS,
      path=path,
      task=config.Task.ANSWER,
      prompt="",
      tokenizer=config.TokenizerKind.BYTES,
      vocab_size=264,
      image_size=32,
      image_channels=3,
    ),
    model=config.ModelConfig(
      decoder=dataclasses.replace(
        # A caption has some fifty bytes, the longest of COCO's 250.
        config.llama_tiny(vocab_size=264),
        max_seq_len=288,
      ),
      image=config.ImageStemConfig(channels=(16, 32, 32), strides=(2, 2, 2)),
      audio=None,
    ),
    privacy=config.PrivacyConfig(epsilon=8.0, delta=1e-5, l2_clip_norm=1.0),
    optimizer=config.OptimizerConfig(learning_rate=5e-3),
    train=config.TrainConfig(
      num_steps=100,
      expected_batch_size=32,
      eval_every_steps=25,
      checkpoint_every_steps=25,
    ),
    perf=config.PerfConfig(microbatch_size=16),
  )
