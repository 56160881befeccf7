"""Table 1: what is done to each modality, read from the pipelines in use.

  python -m ppnet.main --config=configs/paper/table1.py:/data --workdir=DIR

The argument is a folder that holds mnist/ (IDX files) and fsdd/: the records
are spoken-written digits, which have all three modalities. The table is in
`table.md`, `table.tex`, `table.csv` and `table.json`; one record of each
modality through every stage is in `figures/pipeline_<modality>.png`.
"""

from ppnet import config
from ppnet.data import audio, augment_audio, augment_image, image

_SAMPLE_RATE_HZ = 8000
_MAX_SECS = 0.6


def get_config(path: str = "/data") -> config.ExperimentConfig:
  """The pipelines of the paper's experiments, on the data in `path`."""
  sound = config.AudioConfig(
    sample_rate_hz=_SAMPLE_RATE_HZ,
    max_secs=_MAX_SECS,
    feature=config.AudioFeature.MFCC,
  )
  decode, *features = audio.transforms(sound)
  return config.ExperimentConfig(
    name="table1",
    job=config.Job.TABLE,
    data=config.DataConfig(
      source=config.Source.SPOKEN_WRITTEN_DIGITS,
      path=path,
      prompt="",
      vocab_size=160,
      image_size=28,
      image_channels=1,
      image_transforms=(
        image.Decode(image_size=28, image_channels=1, as_uint8=True),
        augment_image.Rotate(max_degrees=10.0),
        augment_image.RandomCrop(size=28, padding=2),
        image.CenterCrop(size=28),
        augment_image.ColorJitter(brightness=0.2, contrast=0.2),
        image.MinMax(),
        image.ZScore(mean=0.1307, std=0.3081),
      ),
      audio=sound,
      audio_transforms=(
        decode,
        augment_audio.AddNoise(min_snr_db=10.0, max_snr_db=30.0),
        augment_audio.TimeStretch(min_rate=0.9, max_rate=1.1),
        augment_audio.PitchShift(max_semitones=1.0),
        audio.FixLength(num_samples=audio.num_samples(sound)),
        *features,
      ),
    ),
    model=config.ModelConfig(
      decoder=config.llama_tiny(vocab_size=160),
      image=config.ImageStemConfig(channels=(16, 32, 32), strides=(2, 2, 2)),
      audio=config.AudioStemConfig(frames_per_token=4),
    ),
  )
