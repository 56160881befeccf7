"""The optimizer that sees the private mean gradient, from optax."""

import optax

from ppnet import config as config_lib


def schedule(
  config: config_lib.OptimizerConfig, num_steps: int
) -> optax.Schedule:
  """Learning rate by step: linear warm-up, then constant or cosine to 0."""
  after = max(num_steps - config.warmup_steps, 1)
  match config.schedule:
    case config_lib.Schedule.CONSTANT:
      main = optax.constant_schedule(config.learning_rate)
    case config_lib.Schedule.COSINE:
      main = optax.cosine_decay_schedule(config.learning_rate, after)
  if not config.warmup_steps:
    return main
  warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
  return optax.join_schedules([warmup, main], [config.warmup_steps])


def build(
  config: config_lib.OptimizerConfig, num_steps: int
) -> optax.GradientTransformation:
  """The transformation behind the privatizer: free, as post-processing is."""
  rate = schedule(config, num_steps)
  match config.name:
    case config_lib.OptimizerName.ADAMW:
      return optax.adamw(
        rate,
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
      )
    case config_lib.OptimizerName.SGD:
      return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(rate, momentum=config.beta1 or None),
      )
