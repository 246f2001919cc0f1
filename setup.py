"""Packaging. requirements.txt pins what is tested; the ranges here are what works."""

import pathlib

import setuptools

setuptools.setup(
  name='farmer_jax',
  version='0.1.0',
  description='FARMER (Flow AutoRegressive Transformer over Pixels) for JAX',
  long_description=pathlib.Path(__file__).with_name('README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  packages=setuptools.find_packages(include=['farmer_jax*']),
  python_requires='>=3.11',
  install_requires=[
    'absl-py',
    'array_record',
    'clu>=0.0.12',
    'einops>=0.8',
    'etils[epath]',
    'flax>=0.12',
    'grain>=0.2.18',
    'importlib_resources',
    'jax>=0.10',
    'matplotlib>=3.8',
    'ml_collections>=1.1',
    'numpy',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'pillow>=10.1',
    'scikit-learn>=1.3',
    'tensorflow-datasets>=4.9.10',
    'tqdm',
  ],
  # CLU's TensorBoard writer, and preparing (not reading) TFDS data sets.
  extras_require={
    'tensorboard': ['tensorflow-cpu>=2.21', 'tensorboard>=2.21'],
    'tpu': ['jax[tpu]'],
  },
)
