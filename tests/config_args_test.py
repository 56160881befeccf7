"""Flags about fields: sorted, checked, unset."""

import dataclasses

import pytest

from ppnet import config as config_lib
from ppnet import config_args
from tests import tiny


def split(*arguments):
  return config_args.Arguments.split(["main", *arguments])


def test_every_field_is_known_and_reachable():
  names = [name for name, _, _ in config_args.fields()]
  assert len(names) == len(set(names))
  assert {"seed", "privacy.epsilon", "model.image.channels"} <= set(names)
  for name in names:
    holder = tiny.experiment()
    decoder = holder.model.decoder  # Optional parts, which the tiny one lacks.
    decoder.rope_scaling = config_lib.RopeScalingConfig()
    decoder.lora = config_lib.LoraConfig()
    holder.model.image.patches = config_lib.PatchStemConfig()
    holder.model.linear = config_lib.LinearConfig(
      words=config_lib.WordsConfig()
    )
    for part in name.split("."):
      holder = getattr(holder, part)


def test_unknown_field_suggests_the_closest():
  with pytest.raises(ValueError, match=r"'train\.num_steps'"):
    split("--config.train.num_step=3").check_fields()
  split("--config.model.image.channels[0]=3").check_fields()


def test_a_config_file_that_is_not_there_is_named(tmp_path):
  (tmp_path / "quickstart.py").write_text("")
  split(f"--config={tmp_path}/quickstart.py:argument").check_file()
  with pytest.raises(ValueError, match=r"Did you mean '.*quickstart\.py'"):
    split(f"--config={tmp_path}/quickstar.py").check_file()
  with pytest.raises(ValueError, match="name a file"):
    split("--config").check_file()


def test_a_field_without_a_value_is_refused():
  with pytest.raises(ValueError, match="with the ="):
    split("--config.seed")


def test_none_unsets_optional_fields_and_leaves_the_rest_to_the_parser():
  arguments = split(
    "--config=x.py",
    "--config.privacy.epsilon=none",
    "--config.model.audio=None",
    "--config.name=none",
    "--workdir=w",
  )
  assert arguments.without_none == [
    "main",
    "--config=x.py",
    "--config.name=none",  # A name may be "none".
    "--workdir=w",
  ]
  config = tiny.experiment()
  arguments.set_none(config)
  assert config.privacy.epsilon is None
  assert config.model.audio is None
  assert config.name == "tiny"


def test_children_get_the_flags_about_the_config_alone():
  arguments = split(
    "--config", "x.py", "--config.seed=1", "--workdir=w", "--sweep=seed=1,2"
  )
  assert arguments.config_flags == ["--config=x.py", "--config.seed=1"]
  assert arguments.overrides == ["seed=1"]


def test_help_shows_defaults_and_choices():
  text = split().describe_fields()
  assert "  privacy.sampler = poisson (poisson, " in text
  for field in dataclasses.fields(tiny.experiment().train):
    assert f"  train.{field.name} = " in text


def test_every_field_is_explained():
  meanings = dict(config_args._meanings())
  names = [name for name, _, _ in config_args.fields()]
  assert [name for name in names if not meanings.get(name)] == []
  assert set(meanings) == set(names)
