"""Which class reads which `data.source`. A new source needs a line here.

`raw` says what else it needs.

>>> open_raw(config_lib.DataConfig()).num_records("test")
360
"""

from collections.abc import Callable

from ppnet import config as config_lib
from ppnet.data import raw, raw_media, raw_pairs, raw_table, raw_text

_Source = config_lib.Source

_CLASSES: dict[
  config_lib.Source, Callable[[config_lib.DataConfig], raw.RawDataset]
] = {
  _Source.DIGITS: raw_media.Digits,
  _Source.IMAGE_FOLDER: raw_media.image_folder,
  _Source.AUDIO_FOLDER: raw_media.audio_folder,
  _Source.IDX: raw_media.Idx,
  _Source.FSDD: raw_media.Fsdd,
  _Source.CLOTHING_REVIEWS: raw_text.ClothingReviews,
  _Source.SQUAD: raw_text.Squad,
  _Source.COCO_CAPTIONS: raw_pairs.CocoCaptions,
  _Source.SPOKEN_WRITTEN_DIGITS: raw_pairs.SpokenWrittenDigits,
  _Source.TEXT_FILE: raw_text.TextFile,
  _Source.TABLE: raw_table.Table,
  _Source.TFDS: raw_table.Tfds,
  _Source.ARRAY_RECORD: raw_table.ArrayRecords,
}


def open_raw(config: config_lib.DataConfig) -> raw.RawDataset:
  """Opens the raw data set that a config names.

  Raises:
    ValueError: it is not there or not as the source expects it.
  """
  return _CLASSES[config.source](config)
