"""Which records of a user a step takes."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from ppnet.privacy import user_records


@hypothesis.given(
  num_records=st.integers(0, 40),
  max_records=st.integers(1, 12),
  step=st.integers(0, 9),
  user=st.integers(0, 9),
)
def test_choices_are_a_set_of_at_most_so_many(
  num_records, max_records, step, user
):
  chooser = user_records.RecordChooser(max_records=max_records, root=5)
  chosen = chooser.choose(step, user, num_records)
  assert len(chosen) == min(num_records, max_records)
  assert (np.diff(chosen) > 0).all()
  assert not len(chosen) or (chosen[0] >= 0 and chosen[-1] < num_records)
  np.testing.assert_array_equal(chosen, chooser.choose(step, user, num_records))


def test_steps_users_and_roots_choose_differently_and_evenly():
  chooser = user_records.RecordChooser(max_records=3, root=5)
  other = user_records.RecordChooser(max_records=3, root=6)
  drawn = np.array([chooser.choose(step, 2, 12) for step in range(400)])
  counts = np.bincount(drawn.ravel(), minlength=12)
  assert np.abs(counts - 100).max() < 5 * np.sqrt(100 * 0.75)
  assert (drawn != [chooser.choose(step, 3, 12) for step in range(400)]).any()
  assert (drawn != [other.choose(step, 2, 12) for step in range(400)]).any()
  # Fails if: every step takes a user's first records.


def test_the_root_is_not_shown_and_sizes_are_checked():
  assert "99" not in repr(user_records.RecordChooser(max_records=3, root=99))
  with pytest.raises(ValueError, match="max_records > 0"):
    user_records.RecordChooser(max_records=0, root=1)
