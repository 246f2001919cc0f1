"""How a setting is declared."""

import dataclasses


def key(default, doc, choices=None, changeable=False, least=None, below=None):
  """Declares a setting.

  Args:
    default: its default.
    doc: its unit and meaning.
    choices: its allowed values, if they are few.
    least: the smallest allowed number; without it numbers must be above 0.
    below: what a number must stay below, if anything.
    changeable: whether a run may go on with another value, because nothing that is computed depends
      on it.
  """
  metadata = {
    'doc': doc,
    'choices': choices,
    'changeable': changeable,
    'least': least,
    'below': below,
  }
  return dataclasses.field(default=default, metadata=metadata)


def section(cls):
  """Declares a group of settings."""
  return dataclasses.field(default_factory=cls)
