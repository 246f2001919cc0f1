"""Keys and values that earlier versions named differently.

Saved configurations stay readable. Command lines and configuration files must use the new names.
"""

from typing import Any

RENAMED_KEYS = {
  'data.stall_seconds': 'data.stall_warning_seconds',
  'distill.drawn_share': 'distill.generated_fraction',
  'distill.input_noise': 'distill.input_noise_std',
  'fidelity.compared': 'fidelity.pairwise_images',
  'fidelity.neighbours': 'fidelity.neighbors',
  'fidelity.split': 'fidelity.reference_split',
  'likelihood.other_path': 'likelihood.ood_path',
  'likelihood.other_source': 'likelihood.ood_source',
  'likelihood.other_split': 'likelihood.ood_split',
  'model.prior.redundant': 'model.prior.redundant_kind',
  'noise.curriculum_share': 'noise.curriculum_fraction',
  'sampling.guidance.proposal_logits': 'sampling.guidance.proposal_logit_factor',
  'sampling.guidance.proposal_scales': 'sampling.guidance.proposal_scale_factor',
  'sampling.guidance.weighing_logits': 'sampling.guidance.weighing_logit_factor',
  'sampling.guidance.weighing_scales': 'sampling.guidance.weighing_scale_factor',
  'sampling.chunk': 'sampling.chunk_size',
  'sampling.max_classes': 'sampling.grid_rows',
  'sampling.per_class': 'sampling.grid_columns',
  'train.accumulate': 'train.accumulation_steps',
  'train.max_norm_ratio': 'train.max_grad_norm_ratio',
  'train.max_returns': 'train.max_rollbacks',
  'train.max_skipped': 'train.max_consecutive_skips',
}

# (key, old value): new value.
RENAMED_VALUES = {('distill.objective', 'stages'): 'outputs'}


def upgrade(values: Any, prefix: str = '') -> Any:
  """Returns a copy of a nested dict of settings, with old names replaced by new names.

  Returns a value that is not a dict unchanged. An old key stays if the new key is also present. A
  saved configuration never has both.
  """
  if not isinstance(values, dict):
    return values
  result = {}
  for name, value in values.items():
    path = f'{prefix}{name}'
    new_name = RENAMED_KEYS.get(path, path).rpartition('.')[2]
    if isinstance(value, str):
      value = RENAMED_VALUES.get((path, value), value)
    result[name if new_name in values else new_name] = upgrade(value, f'{path}.')
  return result
