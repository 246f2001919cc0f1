"""examples/torch_farmer.py: the same densities, latents and images in PyTorch as in JAX."""

import ast
import dataclasses
import functools
import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy import stats

from farmer_jax import config as config_lib
from farmer_jax import noise
from farmer_jax.nn import farmer
from farmer_jax.nn import student as student_lib
from tests.support import exports, models

torch = pytest.importorskip('torch', reason='make reference installs PyTorch')
pytestmark = pytest.mark.usefixtures('x64')

FILE = pathlib.Path(__file__).parents[1] / 'examples' / 'torch_farmer.py'
SIZES = dict(width=16, head_dim=8)


def variant(flow=None, prior=None, data=None, noise=None, distill=None, teacher=None, **model):
  """Returns a configuration in float64."""
  base = config_lib.Config(
    data=config_lib.Data(image_size=8, channels=3, num_classes=3),
    model=config_lib.Model(
      patch_size=2,
      dtype='float64',
      flow=config_lib.Flow(blocks=3, layers=2, **SIZES),
      prior=config_lib.Prior(
        **dict(layers=2, condition_copies=2, components=3, informative_channels=5),
        **dict(redundant_components=4, scale_floor=0.1, **SIZES),
      ),
    ),
  )
  changes = dict(data=data or {}, noise=noise or {}, distill=distill or {}, teacher=teacher)
  return models.replace(base, model=dict(flow=flow or {}, prior=prior or {}, **model), **changes)


GAUSSIAN = dict(kind='gaussian', std_end=0.1)
VARIANTS = {
  'default': variant(),
  'one permutation less': variant(dict(blocks=4, final_permutation=False), noise=GAUSSIAN),
  'odd': variant(dict(final_permutation=False)),
  'layers': variant(dict(max_log_scale=0.5), mlp='gated', qk_norm=True, patch_basis='pixels'),
  'class in the flow': variant(dict(class_conditional=True), dict(condition_copies=1)),
  'normal redundant channels': variant(prior=dict(redundant_kind='normal')),
  'all informative': variant(
    prior=dict(informative_channels=0, components=1, scale_floor=0.0), neighborhood=True
  ),
  'tarflow': variant(dict(class_conditional=True), dict(kind='normal'), patch_basis='pixels'),
  'coupling': variant(dict(kind='coupling'), data=dict(channels=1), patch_size=4),
  'two couplings': variant(dict(kind='coupling', blocks=2, class_conditional=True)),
  'no flow': variant(dict(blocks=0)),
  'no classes': variant(data=dict(num_classes=0)),
}
STUDENT = dict(inverse='student', redundant_variance=0.5)
STUDENTS = {
  'student': variant(dict(class_conditional=True), teacher='teacher'),
  'small student': variant(
    dict(final_permutation=False),
    teacher='teacher',
    noise=GAUSSIAN,
    distill=dict(all_tokens=True, width=8, layers=1, denoise=True),
  ),
}


@pytest.fixture(scope='module')
def torch_farmer():
  spec = importlib.util.spec_from_file_location('torch_farmer', FILE)
  module = importlib.util.module_from_spec(spec)
  sys.modules['torch_farmer'] = module
  spec.loader.exec_module(module)
  yield module
  del sys.modules['torch_farmer']


class Pair:
  """A model in JAX and the model in PyTorch that was read from its export."""

  def __init__(self, torch_farmer, folder, config):
    self.config, self.load = config, functools.partial(torch_farmer.load, str(folder))
    data, is_student = config.data, config.teacher is not None
    images = jnp.zeros((1, data.image_size, data.image_size, data.channels))
    self.model = (student_lib if is_student else farmer).build(config)
    self.params = models.filled_parameters(farmer.build(config), images, jnp.zeros(1, int))
    if is_student:
      z = jnp.zeros((1, config.num_tokens, config.token_channels))
      init = functools.partial(models.filled_parameters, seed=1, method='init_student')
      self.params |= init(self.model, z, jnp.zeros(1, int))
    exports.write(folder, config, self.params)
    self.torch = self.load(torch.float64)
    rng = np.random.default_rng(2)
    self.images = jnp.asarray(rng.uniform(-1, 1, (4, *images.shape[1:])))
    self.labels = jnp.arange(4) % (data.num_classes + 1)  # the last is "no class"

  def __call__(self, method, *args, **options):
    apply = functools.partial(self.model.apply, {'params': self.params}, method=method, **options)
    return jax.jit(apply)(*args)

  @functools.cached_property
  def expected(self):
    """Latents, log-determinants and densities of the images in JAX."""

    def compute(params):
      z, log_dets = self.model.apply({'params': params}, *inputs, method='encode')
      density = self.model.apply({'params': params}, z, log_dets, labels, method='log_density')
      return z, log_dets, density

    inputs = _, labels = self.images, self.labels
    return jax.jit(compute)(self.params)

  @property
  def tensors(self):
    images = torch.tensor(np.array(self.images)).permute(0, 3, 1, 2)
    return images, torch.tensor(np.array(self.labels))


@pytest.fixture(scope='module')
def build(torch_farmer, tmp_path_factory):
  @functools.cache
  def build(name):
    return Pair(torch_farmer, tmp_path_factory.mktemp('exports') / 'export', ALL[name])

  return build


ALL = VARIANTS | STUDENTS


def close(found, expected, tolerance=1e-10):
  found, expected = np.asarray(found), np.asarray(expected)
  assert found.shape == expected.shape
  np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def channels_last(images):
  return images.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize('name', VARIANTS)
def test_densities_latents_and_images_equal_those_of_jax(build, name):
  pair = build(name)
  with torch.no_grad():
    z, log_dets = pair.torch.encode(*pair.tensors)
    terms = pair.torch.terms(*pair.tensors)
    log_prob = pair.torch.log_prob(*pair.tensors)
    images = pair.torch.decode(z, pair.tensors[1])
  expected_z, expected_log_dets, density = pair.expected
  close(z, expected_z)
  close(log_dets, expected_log_dets)
  close(log_prob, density.total)
  close(terms['informative'], density.tokens)
  close(terms['redundant'][:, 0], density.redundant)
  close(channels_last(images), pair.images, 1e-8)
  drawn = np.random.default_rng(3).normal(size=z.shape)
  with torch.no_grad():
    images = pair.torch.decode(torch.tensor(drawn), pair.tensors[1])
  close(channels_last(images), pair('decode', drawn, pair.labels)[0], 1e-8)


@pytest.mark.parametrize('name', VARIANTS)
def test_float32(build, name):
  pair = build(name)
  single = pair.load()
  images, labels = pair.tensors
  with torch.no_grad():
    log_prob = single.log_prob(images.float(), labels)
    z, _ = single.encode(images.float(), labels)
  assert log_prob.dtype == torch.float32
  dims = pair.images[0].size
  close(log_prob / dims, pair.expected[2].total / dims, 1e-5)
  close(z, pair.expected[0], 1e-5)


def test_labels_default_to_no_class(build):
  pair = build('default')
  images, _ = pair.tensors
  no_class = torch.full((4,), 3)
  assert torch.equal(pair.torch.log_prob(images), pair.torch.log_prob(images, no_class))
  assert (pair.torch.log_prob(images) != pair.torch.log_prob(images, no_class * 0)).all()


@pytest.mark.parametrize('name', ['default', 'tarflow', 'no classes'])
def test_samples_need_labels(build, name):
  """They give the number of images."""
  model = build(name).torch
  with pytest.raises(ValueError, match=r'torch\.full\(\(count,\), \d\)') as caught:
    model.sample(None)
  assert str(caught.value).endswith(f'torch.full((count,), {model.num_classes})')
  images = model.sample(torch.full((2,), model.num_classes))
  assert len(images) == 2 and images.isfinite().all()


def test_gradients_reach_all_parameters(build):
  pair = build('default')
  pair.torch.log_prob(*pair.tensors).sum().backward()
  grads = jax.grad(
    lambda params: pair.model.apply({'params': params}, pair.images, pair.labels).total.sum()
  )(pair.params)
  found = pair.torch.flow.blocks[1].layers[0].query.kernel.grad
  close(found, grads['flow']['stack']['transformer']['stack']['query']['kernel'][1, 0], 1e-9)
  assert all(p.grad is not None for p in pair.torch.parameters())


@pytest.mark.parametrize('name', ['default', 'normal redundant channels', 'all informative'])
@pytest.mark.parametrize('scale', [0.0, 1.0])
def test_mixtures_while_sampling_equal_those_of_a_full_pass(build, name, scale, monkeypatch):
  """Each token is drawn from its conditional density given the drawn prefix, with a cache."""
  pair, seen = build(name), []
  draws = sys.modules['torch_farmer'].Draws

  def record(self, streams, *args, original=draws._draw):
    seen.append(streams)
    return original(self, streams, *args)

  monkeypatch.setattr(draws, '_draw', record)
  monkeypatch.setitem(pair.torch.sampling['guidance'], 'scale', scale)
  labels = torch.tensor([0, 2, 1])
  z = pair.torch.sample_latents(labels, torch.Generator().manual_seed(0))
  num_streams = 1 + (scale > 0)
  assert {len(streams) for streams in seen} == {num_streams}
  prior = pair.model.bind({'params': pair.params}).prior
  informative = z.numpy()[..., : prior.informative_channels]
  for stream, classes in enumerate([labels.numpy(), np.full(3, 3)][:num_streams]):
    tokens, shared = prior.mixtures(jnp.asarray(informative), jnp.asarray(classes))
    found = [torch.stack(parts, 1) for parts in zip(*(s[stream] for s in seen[:16]), strict=True)]
    for parts, expected in zip(found, jax.tree.leaves(tokens), strict=True):
      close(parts, expected)
    assert len(seen) == 16 + (shared is not None)
    for parts, expected in zip(
      jax.tree.leaves(shared), seen[16:] and seen[16][stream], strict=True
    ):
      close(parts, expected)


def mixture(torch_farmer, *arrays):
  """Returns a batch of equal mixtures in one dimension, from logits, means and deviations."""
  logits, means, stds = (torch.tensor(a, dtype=torch.float64).expand(4000, -1) for a in arrays)
  return torch_farmer.Mixture(logits, means[..., None], stds.log()[..., None])


def density(arrays, z):
  logits, means, stds = map(np.array, arrays)
  weights = np.exp(logits) / np.exp(logits).sum()
  return (weights * stats.norm.pdf(z[:, None], means, stds)).sum(-1)


C, U = ([0.0, 1.0], [-1.0, 2.0], [0.5, 0.7]), ([0.0, 0.0], [-0.5, 1.0], [1.0, 1.2])


@pytest.mark.parametrize(
  ('settings', 'count'),
  [
    (dict(), 1),
    (dict(proposal_logit_factor=2.0, proposal_scale_factor=0.5), 3),
    (dict(scale=1.0, method='component'), 2),
    (dict(scale=0.7, conditional_candidates=300, unconditional_candidates=200), 1),
    (dict(scale=0.7, redundant_candidates=200), 2),
  ],
)
def test_draws_have_the_guided_density(torch_farmer, settings, count):
  """Kolmogorov-Smirnov tests of draws in one dimension against numerical integration."""
  guidance = dataclasses.asdict(config_lib.Guidance(**settings))
  sampling = {'guidance': guidance, 'redundant_variance': 1.0}
  generator = torch.Generator().manual_seed(1)
  draws, w = torch_farmer.Draws(sampling, generator), guidance['scale']
  streams = [mixture(torch_farmer, *a) for a in ((C, U) if w else (C,))]
  found = draws.token(streams, 2, 5) if count == 1 else draws.shared(streams, count)
  assert found.shape == (4000, count, 1)
  grid = np.linspace(-8, 10, 20001)
  logits, means, stds = map(np.array, C)
  if not w:
    factors = guidance['proposal_logit_factor'], guidance['proposal_scale_factor']
    values = density((logits * factors[0], means, stds * factors[1]), grid)
  elif guidance['method'] == 'component':
    precision = (1 + w) / stds**2 - w / np.array(U[2]) ** 2
    product = ((1 + w) * means / stds**2 - w * np.array(U[1]) / np.array(U[2]) ** 2) / precision
    values = density((logits, product, precision**-0.5), grid)
  else:
    values = density(C, grid) ** (1 + w) * density(U, grid) ** -w
  cdf = np.cumsum(values) / values.sum()
  # Draws of one image share a pool, so that only one of them is used.
  test = stats.kstest(found[:, -1, 0].numpy(), lambda z: np.interp(z, grid, cdf))
  assert test.pvalue > 1e-3


def test_component_guidance_where_the_product_is_not_gaussian(torch_farmer):
  guidance = dataclasses.asdict(config_lib.Guidance(scale=9.0, method='component'))
  draws = torch_farmer.Draws({'guidance': guidance, 'redundant_variance': 0.25}, None)
  wide, narrow = ([0.0], [1.0], [2.0]), ([0.0], [0.0], [0.1])
  found = draws.shared([mixture(torch_farmer, *a) for a in (wide, narrow)], 1)
  test = stats.kstest(found[:, 0, 0].numpy(), stats.norm(1.0, 2.0 * 0.25**0.5).cdf)
  assert test.pvalue > 1e-3


def test_guidance_scale_is_linear_in_the_token(torch_farmer, monkeypatch):
  guidance = dataclasses.asdict(config_lib.Guidance(scale=1.0, final_scale=3.0))
  draws, seen = torch_farmer.Draws({'guidance': guidance, 'redundant_variance': 1.0}, None), []
  monkeypatch.setattr(draws, '_draw', lambda streams, w, *rest: seen.append(w))
  for i in range(5):
    draws.token([], i, 5)
  draws.shared([], 5)
  assert seen == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]


def test_samples(build, monkeypatch):
  """They are the decoded latents, and depend only on the generator."""
  pair = build('default')
  labels = torch.tensor([0, 1, 2])
  sample = functools.partial(pair.torch.sample, labels)
  images = sample(torch.Generator().manual_seed(0))
  z = pair.torch.sample_latents(labels, torch.Generator().manual_seed(0))
  close(channels_last(images), pair('decode', z.numpy(), labels.numpy())[0], 1e-8)
  assert images.shape == (3, 3, 8, 8) and not images.requires_grad
  assert torch.equal(images, sample(torch.Generator().manual_seed(0)))
  assert (images != sample(torch.Generator().manual_seed(1))).any((1, 2, 3)).all()


@pytest.mark.parametrize('name', ['tarflow', 'no flow', 'no classes', 'coupling'])
def test_samples_of_other_models(build, name):
  pair = build(name)
  labels = torch.zeros(2, dtype=torch.long)
  found = pair.torch.sample(labels, torch.Generator().manual_seed(0))
  z, _ = pair.torch.encode(found, labels)
  drawn = pair.torch.sample_latents(labels, torch.Generator().manual_seed(0))
  close(z.detach(), drawn, 1e-8)


def test_denoising_equals_that_of_jax(build, monkeypatch):
  pair = build('one permutation less')
  score = jax.grad(lambda x: pair.model.apply({'params': pair.params}, x, pair.labels).total.sum())(
    pair.images
  )
  close(channels_last(pair.torch.denoise(*pair.tensors)), pair.images + 0.1**2 * score)
  labels = pair.tensors[1]
  noisy = pair.torch.sample(labels, torch.Generator().manual_seed(0))
  monkeypatch.setitem(pair.torch.sampling, 'denoise', True)
  found = pair.torch.sample(labels, torch.Generator().manual_seed(0))
  assert torch.equal(found, pair.torch.denoise(noisy, labels))


@pytest.mark.parametrize('name', STUDENTS)
def test_student(build, name, monkeypatch):
  pair = build(name)
  z = np.random.default_rng(3).normal(size=(4, 16, 12))
  expected, _ = pair('decode_with_student', z, pair.labels)
  labels = pair.tensors[1]
  found = pair.torch.decode(torch.tensor(z), labels, student=True)
  close(channels_last(found.detach()), expected, 1e-9)
  for key, value in dict(inverse='student', denoise=pair.config.distill.denoise).items():
    monkeypatch.setitem(pair.torch.sampling, key, value)
  seed = torch.Generator().manual_seed
  images = pair.torch.sample(labels, seed(0))
  latents = pair.torch.sample_latents(labels, seed(0))
  assert torch.equal(images, pair.torch.decode(latents, labels, student=True))
  monkeypatch.setitem(pair.torch.sampling, 'refinement_rounds', 1)
  with pytest.raises(ValueError, match='refinement'):
    pair.torch.sample(labels)


@pytest.mark.parametrize('name', ['default', 'one permutation less'])
def test_8_bit_images(build, name):
  pair = build(name)
  levels = torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8)
  values = pair.torch.from_uint8(levels)
  expected = noise.build(pair.config.noise).quantize(jnp.asarray(values.numpy()))
  np.testing.assert_array_equal(pair.torch.to_uint8(values), expected)
  if name == 'default':
    assert torch.equal(pair.torch.to_uint8(values), levels)
    error = (values - levels.double() / 128 + 1).numpy() * 128
    assert stats.kstest(error.ravel(), stats.uniform.cdf).pvalue > 1e-3
  else:
    error = (values - levels.double() / 127.5 + 1).numpy()
    assert stats.kstest(error.ravel(), stats.norm(0, 0.1).cdf).pvalue > 1e-3


def test_several_files(torch_farmer, build, tmp_path):
  pair = build('default')
  exports.write(tmp_path / 'export', pair.config, pair.params, max_bytes=20_000)
  assert len(list((tmp_path / 'export').glob('*.safetensors'))) > 2
  model = torch_farmer.load(str(tmp_path / 'export'), torch.float64)
  assert torch.equal(model.log_prob(*pair.tensors), pair.torch.log_prob(*pair.tensors))


def test_all_settings_of_the_model_are_known(torch_farmer):
  """A new key of config.model needs an implementation in torch_farmer.py, or an entry in KEYS."""
  paths = {path.removeprefix('model.') for path, _ in config_lib.leaves() if 'model.' in path}
  assert paths == torch_farmer.KEYS
  choices = {path: key.choices for path, key in config_lib.leaves()}
  for path, values in torch_farmer.VALUES.items():
    assert set(values) == set(choices[f'model.{path}'] or (False, True))


@pytest.mark.parametrize(
  ('change', 'named'),
  [
    ({'model': {'window': 3}}, 'model.window=3'),
    ({'model': {'mlp': 'mixture of experts'}}, 'model.mlp'),
    ({'model': {'flow': {'kind': 'spline'}}}, 'flow.kind'),
    ({'model': {'prior': {'rope': True}}}, 'prior.rope'),
  ],
)
def test_unknown_settings_are_refused(torch_farmer, tmp_path, change, named):
  values = config_lib.to_dict(variant())

  def update(target, source):
    for key, value in source.items():
      update(target[key], value) if isinstance(value, dict) else target.update({key: value})

  update(values, change)
  config = exports.record(variant(), config=values)
  (tmp_path / 'config.json').write_text(json.dumps(config))
  save_file({}, tmp_path / 'model.safetensors')
  with pytest.raises(ValueError, match=named) as caught:
    torch_farmer.load(str(tmp_path))
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('content', [{}, {'export_format': 2}])
def test_other_formats_are_refused(torch_farmer, tmp_path, content):
  (tmp_path / 'config.json').write_text(json.dumps(content))
  with pytest.raises(ValueError, match='export_format 1'):
    torch_farmer.load(str(tmp_path))


def test_the_file_needs_no_other_file():
  tree = ast.parse(FILE.read_text())
  names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
  names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
  packages = {name.partition('.')[0] for name in names}
  assert packages - set(sys.stdlib_module_names) == {'numpy', 'safetensors', 'torch'}
