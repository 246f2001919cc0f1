"""ImageNet 256×256: distills a student that inverts each flow block in one pass.

    python -m farmer_jax.main --config=configs/in256_distill.py --config.teacher=RUN   # 1.1b-p16
    python -m farmer_jax.main --config=configs/in256_distill.py:1.9b-p8 --config.teacher=RUN
    python -m farmer_jax.main --job=sample --config=configs/from_run.py:STUDENT --workdir=STUDENT

RUN is the workdir of a run of configs/in256.py with the same variant. STUDENT is the workdir of the
first or second command. Training takes 60 epochs.

Hardware: a TPU pod slice or a GPU cluster.
Published result: the inverse takes 0.0076 s instead of 0.1689 s per image, and FID is 5.63 instead
of 5.55. The teacher was trained for 280 epochs, instead of 320 as in configs/in256.py. The paper
states neither its size nor the optimizer of distillation. This file uses the optimizer of training.
This result has not been reproduced with farmer_jax (docs/paper.md).
"""

from ml_collections import ConfigDict

from farmer_jax.configs import in256

_EPOCHS = 60


def get_config(variant: str = '1.1b-p16') -> ConfigDict:
  """Returns the configuration of a variant <size>-<patch> (see configs/in256.py)."""
  c = in256.get_config(variant)
  c.name = f'in256_distill-{variant}'
  c.job = 'distill'
  c.train.steps = _EPOCHS * in256.TRAIN_IMAGES // c.train.batch_size
  c.sampling.inverse = 'student'
  return c
