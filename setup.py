"""Packaging. requirements.txt pins the tested versions; this file lists the supported ranges.

farmer_jax/configs is a symbolic link to configs/, and farmer_jax/exports/torch_farmer.py to
examples/torch_farmer.py, so that wheels contain these files.
"""

import pathlib
import re

import setuptools

_ROOT = pathlib.Path(__file__).parent
_VERSION = re.search(
  r"^__version__ = '(.+)'$", (_ROOT / 'farmer_jax' / '__init__.py').read_text(), re.MULTILINE
)
assert _VERSION is not None

setuptools.setup(
  name='farmer_jax',
  version=_VERSION[1],
  description='FARMER (Flow AutoRegressive Transformer over Pixels) for JAX',
  long_description=(_ROOT / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  keywords='normalizing flow, autoregressive model, image generation, likelihood, JAX, Flax',
  project_urls={'Paper': 'https://arxiv.org/abs/2510.23588'},
  classifiers=[
    'Development Status :: 4 - Beta',
    'Environment :: Console',
    'Intended Audience :: Science/Research',
    'Operating System :: POSIX :: Linux',
    'Programming Language :: Python :: 3 :: Only',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
    'Typing :: Typed',
  ],
  packages=setuptools.find_packages(include=['farmer_jax*']),
  package_data={'farmer_jax': ['py.typed']},
  entry_points={'console_scripts': ['farmer_jax = farmer_jax.main:run']},
  python_requires='>=3.11',
  # The upper bounds exclude versions whose internals differ: farmer_jax uses internals of Orbax and
  # Grain, and matches error messages of Orbax and TensorStore.
  install_requires=[
    'absl-py',
    'array_record',
    'clu>=0.0.12',
    'einops>=0.8',
    'etils[epath]',
    'flax>=0.12,<0.13',
    'fsspec',
    'grain>=0.2.18,<0.3',
    'importlib_resources',
    'jax>=0.10,<0.13',
    'jaxtyping>=0.3.11',
    'matplotlib>=3.8',
    'ml_collections>=1.1',
    'numpy',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8,<0.13',
    'pillow>=10.1',
    'safetensors>=0.8',
    'scikit-learn>=1.3',
    'tensorflow-datasets>=4.9.10',
    'tensorstore',
    'tqdm',
  ],
  extras_require={
    'cuda': ['jax[cuda12]'],
    'tpu': ['jax[tpu]'],
    # Workdirs in object stores: gs://bucket/run and s3://bucket/run.
    'gcs': ['gcsfs'],
    's3': ['s3fs'],
    # Exports on the Hugging Face hub: hf://USER/NAME.
    'hub': ['huggingface_hub>=0.34'],
    # TensorBoard events, and the preparation of TFDS data sets. Reading them needs no TensorFlow.
    'tensorboard': ['tensorflow-cpu>=2.21', 'tensorboard>=2.21'],
    # Weights & Biases (config.tracker).
    'wandb': ['wandb>=0.31'],
    # The documentation site and the notebook.
    'docs': [
      'ipykernel>=7',
      'jupytext>=1.19',
      'mkdocs-material>=9.8',
      'mkdocs>=1.6,<2',
      'mkdocstrings-python>=2',
      'nbclient>=0.11',
      'nbformat>=5.11',
    ],
    'dev': [
      'beartype>=0.23',
      'chex>=0.1.92',
      'hypothesis>=6',
      'mypy>=2.4',
      'pytest>=9',
      'pytest-xdist>=3.8',
      'ruff>=0.17',
    ],
  },
)
