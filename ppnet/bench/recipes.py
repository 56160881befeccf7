"""Linear classifiers trained privately by other libraries, by their recipes.

A recipe is what an example or a tutorial of Opacus or of JAX-Privacy sets:
optimizer, rate, batch size, epochs and clip norm. Its noise is not taken from
there: the library itself calibrates it to the budget that is asked for. All
else is the library's too: Poisson sampling, clipping, noise, accountant.

What differs from an example: the model is one matrix and a bias, and the
number of records is another, so that batch size and epochs stay and the number
of steps follows. Opacus's matrix begins as PyTorch's do, JAX-Privacy's at zero,
as in its examples of linear models.

Draws and noise are seeded, so that a row can be made again: a benchmark
promises nobody anything.
"""

import dataclasses
import enum
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppnet.core import prng

_PADDING_MULTIPLE = 64  # Batches are padded to it: few compilations.


class Library(enum.Enum):
  """Whose code trains."""

  OPACUS = "Opacus"
  JAX_PRIVACY = "JAX-Privacy"


class Optimizer(enum.Enum):
  """The library's own, its other settings at their defaults."""

  SGD = "SGD"
  ADAM = "Adam"
  RMSPROP = "RMSprop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """Everything that an example fixes, and its budget is not among it.

  Attributes:
    name: of the row.
    library: whose recipe it is.
    source: the example that sets it.
    optimizer: see `Optimizer`.
    learning_rate: of the first step.
    momentum: SGD's.
    is_cosine: whether the rate follows a half cosine, epoch by epoch, from its
      first value to about 0 (Opacus alone).
    batch_size: expected; all records where there are fewer.
    num_epochs: passes over as many records as there are.
    l2_clip_norm: C.
    is_rescaled: whether clipped gradients are divided by C (JAX-Privacy alone).
    begins_at_zero: whether Opacus's matrix begins at zero as well.
    feature_norm: norm that each record's features are scaled to; 0 leaves them
      as they are.
    is_of_users: whether a unit is a user, whose records' mean gradient is
      clipped (JAX-Privacy alone); batch size and epochs count users then.
  """

  name: str
  library: Library
  source: str
  optimizer: Optimizer = Optimizer.SGD
  learning_rate: float
  momentum: float = 0.0
  is_cosine: bool = False
  batch_size: int
  num_epochs: float
  l2_clip_norm: float = 1.0
  is_rescaled: bool = False
  begins_at_zero: bool = False
  feature_norm: float = 0.0
  is_of_users: bool = False


class Plan(NamedTuple):
  """What the guarantee depends on.

  Attributes:
    noise_multiplier: as the library calibrated it.
    sampling_prob: of each record in each step.
    num_steps: how many.
    epsilon: as the library's own accountant says.
  """

  noise_multiplier: float
  sampling_prob: float
  num_steps: int
  epsilon: float


class Data(NamedTuple):
  """Features f32[n, D] and classes i64[n] of both splits.

  Where units are users, the training split's are f32[n, R, D] and i64[n, R]: R
  records of each of n users.
  """

  train_features: np.ndarray
  train_labels: np.ndarray
  test_features: np.ndarray
  test_labels: np.ndarray
  num_classes: int


STOCK = (
  Recipe(
    name="MNIST",
    library=Library.OPACUS,
    source="examples/mnist.py",
    learning_rate=0.1,
    batch_size=64,
    num_epochs=10,
  ),
  Recipe(
    name="CIFAR-10",
    library=Library.OPACUS,
    source="examples/cifar10.py",
    learning_rate=0.1,
    momentum=0.9,
    is_cosine=True,
    batch_size=2000,
    num_epochs=90,
    l2_clip_norm=10.0,
  ),
  Recipe(
    name="image classifier",
    library=Library.OPACUS,
    source="tutorials/building_image_classifier.ipynb",
    optimizer=Optimizer.RMSPROP,
    learning_rate=1e-3,
    batch_size=512,
    num_epochs=20,
    l2_clip_norm=1.2,
  ),
  Recipe(
    name="IMDb",
    library=Library.OPACUS,
    source="examples/imdb.py",
    optimizer=Optimizer.ADAM,
    learning_rate=0.02,
    batch_size=64,
    num_epochs=10,
  ),
  Recipe(
    name="names by an LSTM",
    library=Library.OPACUS,
    source="examples/char-lstm_README.md",
    learning_rate=2.0,
    batch_size=800,
    num_epochs=50,
    l2_clip_norm=1.5,
  ),
  Recipe(
    name="MNIST, Keras, batches of 128",
    library=Library.JAX_PRIVACY,
    source="examples/keras_api_example.py, an earlier version",
    optimizer=Optimizer.ADAM,
    learning_rate=1e-3,
    batch_size=128,
    num_epochs=5,
  ),
  Recipe(
    name="MNIST, Keras, batches of 512",
    library=Library.JAX_PRIVACY,
    source="examples/keras_api_example.py",
    optimizer=Optimizer.ADAM,
    learning_rate=1e-3,
    batch_size=512,
    num_epochs=5,
  ),
  Recipe(
    name="MNIST, Flax",
    library=Library.JAX_PRIVACY,
    source="examples/dp_sgd_flax_linen_mnist.py",
    learning_rate=0.1,
    momentum=0.9,
    batch_size=256,
    num_epochs=5000 * 256 / 60_000,
    l2_clip_norm=0.1,
    is_rescaled=True,
  ),
  Recipe(
    name="logistic regression",
    library=Library.JAX_PRIVACY,
    source="examples/dp_sgd_execution_plan.py",
    learning_rate=0.25,
    batch_size=250,
    num_epochs=200 * 250 / 5000,
    is_rescaled=True,
  ),
  Recipe(
    name="linear regression",
    library=Library.JAX_PRIVACY,
    source="examples/jax_api_example.py",
    learning_rate=1e-3,
    batch_size=256,
    num_epochs=100,
  ),
  Recipe(
    name="user-level transformer",
    library=Library.JAX_PRIVACY,
    source="examples/user_level_transformer_example.py",
    optimizer=Optimizer.ADAM,
    learning_rate=0.05,
    batch_size=2,
    num_epochs=10 * 2 / 4,
    is_of_users=True,
  ),
)

PACKAGES = {
  Library.OPACUS: ("torch", "opacus"),
  Library.JAX_PRIVACY: ("jax_privacy",),
}


def plan(
  recipe: Recipe, *, num_examples: int, epsilon: float, delta: float
) -> Plan:
  """Calibrates the noise by the recipe's library.

  Opacus: its default accountant (PRV) and its search, which ends within 0.01
  below `epsilon`. It draws with one over the number of batches of an epoch.
  JAX-Privacy: PLD, add-or-remove-one, to 0.001 of a noise multiplier.

  Args:
    recipe: see `Recipe`.
    num_examples: N, of units.
    epsilon: what is to be spent at most.
    delta: at this probability of failure.
  """
  if recipe.library is Library.OPACUS:
    return _opacus_plan(recipe, num_examples, epsilon, delta)
  return _jax_privacy_plan(recipe, num_examples, epsilon, delta)


def train(
  recipe: Recipe, plan: Plan, data: Data, *, seeds: Sequence[int]
) -> Iterator[np.ndarray]:
  """Trains by the recipe's library, once for each seed.

  Args:
    recipe: see `Recipe`; its `feature_norm` was applied to `data`.
    plan: from `plan`.
    data: see `Data`.
    seeds: of initial parameters, draws and noise.

  Yields:
    Logits f32[n, classes] of the test split.
  """
  trainer = (
    _train_by_opacus
    if recipe.library is Library.OPACUS
    else _train_by_jax_privacy
  )
  return trainer(recipe, plan, data, seeds)


def _opacus_plan(
  recipe: Recipe, num_examples: int, epsilon: float, delta: float
) -> Plan:
  """What `PrivacyEngine.make_private_with_epsilon` works out."""
  from opacus import accountants
  from opacus.accountants import utils

  # One over a loader's batches, of which the last may be a smaller one.
  sampling_prob = 1 / math.ceil(num_examples / recipe.batch_size)
  num_steps = round(recipe.num_epochs) * round(1 / sampling_prob)
  accountant = accountants.PRVAccountant()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Of its search's bounds.
    noise_multiplier = utils.get_noise_multiplier(
      target_epsilon=epsilon,
      target_delta=delta,
      sample_rate=sampling_prob,
      steps=num_steps,
      accountant=accountant.mechanism(),
    )
    accountant.history = [(noise_multiplier, sampling_prob, num_steps)]
    spent = accountant.get_epsilon(delta)
  return Plan(noise_multiplier, sampling_prob, num_steps, float(spent))


def _train_by_opacus(
  recipe: Recipe, plan: Plan, data: Data, seeds: Sequence[int]
) -> Iterator[np.ndarray]:
  """`PrivacyEngine.make_private` and the loop of its examples."""
  import torch

  dataset = torch.utils.data.TensorDataset(
    torch.from_numpy(data.train_features), torch.from_numpy(data.train_labels)
  )
  for seed in seeds:
    torch.manual_seed(seed)  # Its loader and its noise draw from this as well.
    model = torch.nn.Linear(data.train_features.shape[1], data.num_classes)
    if recipe.begins_at_zero:
      torch.nn.init.zeros_(model.weight)
      torch.nn.init.zeros_(model.bias)
    with warnings.catch_warnings():
      # Of its random generator, which is no secure one, and of its hooks.
      warnings.simplefilter("ignore")
      _opacus_epochs(recipe, plan, model, dataset)
    with torch.no_grad():
      yield model(torch.from_numpy(data.test_features)).numpy()


def _opacus_epochs(
  recipe: Recipe, plan: Plan, model: Any, dataset: Any
) -> None:
  """Trains `model` in its place."""
  import opacus
  import torch

  # Its ghost clipping: the same sum as with a gradient for each example in
  # memory, in a tenth of the time.
  wrapped, optimizer, loss_fn, loader = opacus.PrivacyEngine().make_private(
    module=model,
    optimizer=_torch_optimizer(recipe, model.parameters()),
    criterion=torch.nn.CrossEntropyLoss(),
    data_loader=torch.utils.data.DataLoader(
      dataset, batch_size=min(recipe.batch_size, len(dataset))
    ),
    noise_multiplier=plan.noise_multiplier,
    max_grad_norm=recipe.l2_clip_norm,
    grad_sample_mode="ghost",
  )
  num_epochs = round(recipe.num_epochs)
  for epoch in range(1, num_epochs + 1):
    if recipe.is_cosine:
      share = 0.5 * (1 + math.cos(math.pi * epoch / (num_epochs + 1)))
      for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate * share
    for inputs, targets in loader:
      optimizer.zero_grad()
      loss_fn(wrapped(inputs), targets).backward()
      optimizer.step()


def _torch_optimizer(recipe: Recipe, parameters: Any) -> Any:
  """PyTorch's optimizer of the recipe."""
  import torch

  match recipe.optimizer:
    case Optimizer.SGD:
      return torch.optim.SGD(
        parameters, lr=recipe.learning_rate, momentum=recipe.momentum
      )
    case Optimizer.ADAM:
      return torch.optim.Adam(parameters, lr=recipe.learning_rate)
    case Optimizer.RMSPROP:
      return torch.optim.RMSprop(parameters, lr=recipe.learning_rate)


def _jax_privacy_plan(
  recipe: Recipe, num_examples: int, epsilon: float, delta: float
) -> Plan:
  """By `accounting.calibrate_noise_multiplier`."""
  from jax_privacy import accounting

  batch_size = min(recipe.batch_size, num_examples)
  # A whole number may come out of the division a little below itself.
  num_steps = max(
    1, math.floor(recipe.num_epochs * num_examples / batch_size + 1e-6)
  )
  accountant = accounting.DpsgdTrainingAccountant(
    accounting.PldAccountantConfig()
  )
  noise_multiplier = accounting.calibrate_noise_multiplier(
    target_epsilon=epsilon,
    accountant=accountant,
    batch_sizes=batch_size,
    num_updates=num_steps,
    num_samples=num_examples,
    target_delta=delta,
    tol=1e-3,
  )
  spent = accountant.compute_epsilon(
    num_steps,
    accounting.DpParams(
      noise_multipliers=noise_multiplier,
      num_samples=num_examples,
      delta=delta,
      batch_size=batch_size,
    ),
  )
  return Plan(
    float(noise_multiplier), batch_size / num_examples, num_steps, float(spent)
  )


def _train_by_jax_privacy(
  recipe: Recipe, plan: Plan, data: Data, seeds: Sequence[int]
) -> Iterator[np.ndarray]:
  """Its clipped gradients, its noise and its batches, and optax behind them."""
  import dp_accounting
  import optax
  from jax_privacy import batch_selection, clipping, noise_addition

  num_examples, num_features = (
    len(data.train_features),
    data.train_features.shape[-1],
  )

  def loss_fn(params, inputs, targets):  # Of one unit, with an axis for it.
    logits = inputs @ params["weights"]
    logits += jnp.broadcast_to(params["bias"], logits.shape)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses.mean()

  grad_fn = clipping.clipped_grad(
    loss_fn,
    l2_clip_norm=recipe.l2_clip_norm,
    rescale_to_unit_norm=recipe.is_rescaled,
    normalize_by=plan.sampling_prob * num_examples,
    batch_argnums=(1, 2),
  )
  relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
  privatizer = lambda seed: noise_addition.gaussian_privatizer(
    stddev=plan.noise_multiplier * grad_fn.sensitivity(relation),
    prng_key=prng.stream(prng.root(seed), prng.Stream.DP_NOISE, 0),
  )
  add_noise = privatizer(0).update  # Its key is in its state.
  optimizer = _optax_optimizer(recipe)

  @jax.jit
  def update(state, features, labels, index):
    params, noise_state, opt_state = state
    grads = grad_fn(
      params, features[index], labels[index], is_padding_example=index == -1
    )
    grads, noise_state = add_noise(grads, noise_state)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), noise_state, opt_state

  features = jnp.asarray(data.train_features)
  labels = jnp.asarray(data.train_labels, jnp.int32)
  for seed in seeds:
    params = {
      "weights": jnp.zeros((num_features, data.num_classes)),
      "bias": jnp.zeros(data.num_classes),
    }
    state = (params, privatizer(seed).init(params), optimizer.init(params))
    batches = batch_selection.CyclicPoissonSampling(
      sampling_prob=plan.sampling_prob, iterations=plan.num_steps
    ).batch_iterator(num_examples, rng=seed)
    for drawn in batches:
      # One row of padding at the least: an empty draw is a step of pure noise.
      index = batch_selection.pad_to_multiple_of(
        np.append(drawn, -1).astype(np.int32), _PADDING_MULTIPLE
      )
      state = update(state, features, labels, index)
    params = jax.device_get(state[0])
    yield data.test_features @ params["weights"] + params["bias"]


def _optax_optimizer(recipe: Recipe) -> Any:
  """optax's optimizer of the recipe."""
  import optax

  makers: dict[Optimizer, Callable[[], Any]] = {
    Optimizer.SGD: lambda: optax.sgd(
      recipe.learning_rate, momentum=recipe.momentum or None
    ),
    Optimizer.ADAM: lambda: optax.adam(recipe.learning_rate),
    Optimizer.RMSPROP: lambda: optax.rmsprop(recipe.learning_rate),
  }
  return makers[recipe.optimizer]()
