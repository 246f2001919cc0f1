"""Settings of Hypothesis for reproducible tests."""

import hypothesis


def settings(max_examples):
  return hypothesis.settings(
    max_examples=max_examples,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
