"""A picture comes out of its gradient, and is lost in noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet.audit import inversion
from ppnet.core import prng, records
from ppnet.data import examples
from ppnet.report import inversion as inversion_figures
from ppnet.train import loop
from tests import tiny

SHAPE = (6, 6, 1)
HIDDEN = 24


def loss_fn(params, batch):
  """One hidden layer; which picture it saw is in the gradient of the first."""
  x = batch["image"].reshape(1, -1)
  hidden = jnp.tanh(x @ params["w"] + params["b"][None])
  return jnp.square(hidden @ params["v"][:, None] - 1.0).sum(axis=1), {}


def toy():
  rng = np.random.default_rng(0)
  params = {
    "w": rng.normal(size=(36, HIDDEN)) / 6,
    "b": rng.normal(size=HIDDEN),
    "v": rng.normal(size=HIDDEN) / 5,
  }
  params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
  picture = (np.indices((6, 6)).sum(axis=0) % 4 / 3).astype(np.float32)
  batch = {
    "image": jnp.asarray(picture).reshape(1, *SHAPE),
    "key": jax.random.split(jax.random.key(0), 1),
  }
  return params, batch


def test_a_picture_is_found_in_its_gradient_and_lost_in_noise():
  params, batch = toy()
  grad = jax.grad(lambda p: loss_fn(p, batch)[0].sum())(params)
  length = np.linalg.norm([np.linalg.norm(g) for g in jax.tree.leaves(grad)])
  attack = jax.jit(
    functools.partial(
      inversion.reconstruct,
      loss_fn=loss_fn,
      num_steps=300,
      learning_rate=0.05,
      total_variation=0.0,
      value_range=(0.0, 1.0),
    )
  )
  starts = jax.random.uniform(jax.random.key(1), (2, *batch["image"].shape))
  found = []
  for stddev in (0.0, float(length)):
    noisy = inversion._noisy(grad, noise_stddev=stddev, key=jax.random.key(2))
    picture, match = attack(params, batch, noisy, starts, noise_stddev=stddev)
    assert picture.shape == batch["image"].shape
    assert 0 <= float(picture.min()) <= float(picture.max()) <= 1
    psnr = inversion.peak_to_noise(
      np.asarray(picture), np.asarray(batch["image"]), peak=1.0
    )
    found.append((psnr, float(match)))
  assert found[0][0] > 25
  assert found[0][1] > 0.999
  assert found[1][0] < 12
  # Fails if: the batch's own picture takes part in the attack, or noise does
  # not reach what is attacked.


def test_psnr_has_its_closed_form():
  picture = np.zeros((4, 4, 1))
  assert inversion.peak_to_noise(picture, picture, peak=1.0) == float("inf")
  assert inversion.peak_to_noise(
    picture, picture + 0.1, peak=1.0
  ) == pytest.approx(20.0)
  assert inversion.peak_to_noise(
    picture, picture + 0.2, peak=2.0
  ) == pytest.approx(20.0)


def test_one_record_is_attacked_on_any_number_of_devices(tmp_path):
  (tmp_path / "run").mkdir()
  experiment = loop.open_experiment(
    tiny.experiment(), tmp_path / "run", devices=jax.devices()[:2]
  )
  batch, public = inversion._batch_and_public(experiment, 3)
  dataset = experiment.datasets["train"]
  expected = dataset.batch([examples.Row(3)], size=1)
  np.testing.assert_array_equal(batch["image"], expected["image"])
  assert batch["key"].shape == (1,)
  assert public.shape[1:] == batch["image"].shape[1:]
  # Fails if: one record is to be shared by two devices.


@pytest.mark.slow
def test_the_configured_model_gives_its_picture_away_without_noise(tmp_path):
  config = tiny.experiment()
  config.model.decoder.embed_dim = 32
  config.model.image.channels = (16,)
  config.model.image.strides = (2,)
  (tmp_path / "run").mkdir()
  experiment = loop.open_experiment(
    config, tmp_path / "run", devices=jax.devices()[:1]
  )
  found = inversion.invert_gradient(
    experiment,
    key=prng.root(0),
    position=3,
    noise_multipliers=(0.0, 1.0),
    num_steps=1500,
    num_starts=8,
  )
  print(found.psnr, found.guess_psnr, found.matches)
  assert found.psnr[0] > found.guess_psnr + 3
  assert found.psnr[1] < found.guess_psnr
  assert found.epsilons[0] == float("inf")
  assert 4 < found.epsilons[1] < 5  # One Gaussian release at delta = 1e-5.
  assert found.original.shape == found.reconstructions.shape[1:]
  # Fails if: arrays do not count on their own; 300 steps or 1,500 then end
  # below the guess, at a cosine of 0.99.


def example():
  rng = np.random.default_rng(0)
  return inversion.Inversion(
    original=rng.random(SHAPE),
    reconstructions=rng.random((3, *SHAPE)),
    noise_multipliers=(0.0, 0.01, 1.0),
    epsilons=(float("inf"), 5426.48, 4.377),
    delta=1e-5,
    psnr=(31.25, 15.3, 5.61),
    guess_psnr=12.1,
    matches=(1.0, 0.4, 0.04),
    value_range=(-1.0, 1.0),
    num_parameters=100,
    record_id=3,
  )


def test_the_figure_has_the_record_and_each_level_beside_its_epsilon(tmp_path):
  (tmp_path / "audit").mkdir()
  records.write_json(tmp_path / "audit" / "inversion.json", example().record())
  read = records.read_json(tmp_path / "audit" / "inversion.json")
  fig = inversion_figures.draw(read)
  titles = [ax.get_title() for ax in fig.axes]
  assert titles == [
    "the record",
    "σ = 0\nε = ∞\n31.2 dB",
    "σ = 0.01\nε = 5.43e+03\n15.3 dB",
    "σ = 1\nε = 4.38\n5.61 dB",
  ]
  shown = fig.axes[2].images[0].get_array()
  expected = (np.asarray(read["reconstructions"][1])[..., 0] + 1) / 2
  np.testing.assert_allclose(shown, expected)
  assert "12.1 dB" in fig.get_supxlabel()
  assert inversion_figures.inversion_figure(tmp_path).stat().st_size > 1000
