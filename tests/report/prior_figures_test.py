"""The picture of what random processes draw."""

import numpy as np
import pytest
from PIL import Image

from ppnet.data import garments
from ppnet.report import prior_figures


def test_pictures_stand_in_rows():
  pictures = np.arange(24).reshape(6, 2, 2)
  found = prior_figures.mosaic(pictures, num_columns=3)
  assert found.shape == (4, 6)
  np.testing.assert_array_equal(found[:2, 2:4], pictures[1])
  np.testing.assert_array_equal(found[2:, :2], pictures[3])
  with pytest.raises(ValueError, match="whole rows"):
    prior_figures.mosaic(pictures, num_columns=4)


def test_the_figure_shows_what_is_measured(tmp_path, monkeypatch):
  path = prior_figures.write(tmp_path / "folder" / "priors", num_rows=2)
  assert path.with_suffix(".pdf").exists()
  before = np.asarray(Image.open(path).convert("L"), float)
  assert before.shape[1] > 2 * before.shape[0]
  draw = garments.pictures
  monkeypatch.setattr(garments, "pictures", lambda *a, **k: 1 - draw(*a, **k))
  again = prior_figures.write(tmp_path / "again", num_rows=2)
  changed = np.abs(np.asarray(Image.open(again).convert("L"), float) - before)
  half = before.shape[1] // 2
  assert changed[:, :half].max() == 0
  assert changed[:, half:].mean() > 20
  with pytest.raises(ValueError, match="num_rows"):
    prior_figures.write(tmp_path / "none", num_rows=0)
