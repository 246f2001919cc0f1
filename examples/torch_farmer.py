"""FARMER in PyTorch: densities, latents and samples of a model exported by farmer_jax, without JAX.

This file needs PyTorch, NumPy and safetensors, and nothing else of farmer_jax. Copy it freely
(Apache-2.0). Each export has a copy.

    import torch, torch_farmer

    model = torch_farmer.load('FOLDER')        # the folder of an export, or a copy from the hub
    labels = torch.tensor([0, 1, 2])           # the number of classes means "no class"
    values = model.sample(labels)              # real values, [3, C, H, W], black -1 and white 1
    images = model.to_uint8(values)
    model.log_prob(model.from_uint8(images), labels)  # nats, [3]
    z, log_dets = model.encode(values, labels)        # latents [3, N, d]; log|det| of blocks [T, 3]
    model.decode(z, labels)                           # equals `values`

None in place of labels also means "no class", except for `sample`. Python finds this file in the
current folder, or in a folder of PYTHONPATH.

`model.sampling` has the settings of sampling, for example `model.sampling['guidance']['scale']`.

Letters: B images, N tokens, d channels of a token, T flow blocks, K mixture components, M copies of
the class embedding, S streams of guidance. A kernel has the shape [inputs, outputs], as in Flax.
"""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

EXPORT_FORMAT = 1
LOG_2PI = math.log(2 * math.pi)

# The keys of `config.model` that this file knows, and values of some of them that it implements.
SIZES = ('layers', 'width', 'head_dim', 'mlp_ratio')
FLOW = ('kind', 'blocks', *SIZES, 'final_permutation', 'class_conditional', 'max_log_scale')
PRIOR = ('kind', *SIZES, 'condition_copies', 'components', 'informative_channels', 'scale_floor')
REDUNDANT = ('redundant_kind', 'redundant_components')
KEYS = {
  *('patch_size', 'patch_basis', 'label_dropout', 'dtype', 'mlp', 'qk_norm', 'neighborhood'),
  *('attention', 'remat', 'scan_unroll'),  # without effect here
  *(f'flow.{key}' for key in FLOW),
  *(f'prior.{key}' for key in (*PRIOR, *REDUNDANT)),
}
VALUES: dict[str, tuple] = {
  'patch_basis': ('dct', 'pixels'),
  'mlp': ('gelu', 'gated'),
  'qk_norm': (False, True),
  'neighborhood': (False, True),
  'flow.kind': ('autoregressive', 'coupling'),
  'prior.kind': ('mixture', 'normal'),
  'prior.redundant_kind': ('mixture', 'normal'),
}

Cache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [B, heads, tokens, head_dim]


def load(folder: str, dtype: torch.dtype = torch.float32, device: str = 'cpu') -> 'Farmer':
  """Reads an export: a folder with config.json and model.safetensors, or with an index of files.

  Raises:
    ValueError: the export has another format, or a setting that this file does not implement.
  """
  path = pathlib.Path(folder)
  exported = json.loads((path / 'config.json').read_text())
  if exported.get('export_format') != EXPORT_FORMAT:
    raise ValueError(
      f'{path} is not an export of this format; this file reads export_format {EXPORT_FORMAT},'
      ' which --job=export of farmer_jax writes'
    )
  index = path / 'model.safetensors.index.json'
  files = {'model.safetensors'}
  if index.exists():
    files = set(json.loads(index.read_text())['weight_map'].values())
  tensors: dict[str, Tensor] = {}
  for file in sorted(files):
    tensors |= safetensors.torch.load_file(path / file)
  with torch.device('meta'):  # without memory: the tensors of the files become the parameters
    model = Farmer(exported['config'])
  model.load_state_dict(tensors, assign=True)
  return model.to(device, dtype).eval()


def check(model: dict[str, Any]) -> None:
  """Raises ValueError if this file does not implement a setting of the section `config.model`."""
  flat = {k: v for k, v in model.items() if not isinstance(v, dict)}
  flat |= {f'{k}.{n}': v for k in ('flow', 'prior') for n, v in model[k].items()}
  for key, value in flat.items():
    if key not in KEYS or value not in VALUES.get(key, (value,)):
      raise ValueError(f'torch_farmer does not implement model.{key}={value!r}; use a newer file')


class Dense(nn.Module):
  """A matrix and, unless `bias` is False, a bias."""

  def __init__(self, inputs: int, outputs: int, bias: bool = True):
    super().__init__()
    self.kernel = nn.Parameter(torch.zeros(inputs, outputs))
    self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

  def forward(self, x: Tensor) -> Tensor:
    return x @ self.kernel if self.bias is None else x @ self.kernel + self.bias


class RMSNorm(nn.Module):
  """Root-mean-square normalization."""

  def __init__(self, width: int):
    super().__init__()
    self.scale = nn.Parameter(torch.ones(width))

  def forward(self, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale


class Embedding(nn.Module):
  """Vectors of the classes. The last row is "no class"."""

  def __init__(self, num_classes: int, width: int):
    super().__init__()
    self.embedding = nn.Parameter(torch.zeros(num_classes + 1, width))

  def forward(self, labels: Tensor) -> Tensor:
    return self.embedding[labels]


class Layer(nn.Module):
  """A pre-norm transformer layer without biases."""

  def __init__(self, section: dict[str, Any], model: dict[str, Any], causal: bool):
    super().__init__()
    width, self.head_dim, self.causal = section['width'], section['head_dim'], causal
    hidden = int(section['mlp_ratio'] * width)
    self.gated = model['mlp'] == 'gated'
    if self.gated:
      hidden = max(1, round(section['mlp_ratio'] * width * 2 / 3 / 8)) * 8
    self.attention_norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
    self.query, self.key, self.value = (Dense(width, width, bias=False) for _ in range(3))
    self.qk_norm = model['qk_norm']
    if self.qk_norm:
      self.query_norm, self.key_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
    self.attention_out = Dense(width, width, bias=False)
    self.mlp_in, self.mlp_out = Dense(width, hidden, bias=False), Dense(hidden, width, bias=False)
    if self.gated:
      self.mlp_gate = Dense(width, hidden, bias=False)

  def forward(
    self, x: Tensor, past: tuple[Tensor, Tensor] | None
  ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Maps [B, n, width] to the same shape. With the keys and values `past`, n must be 1."""
    normed = self.attention_norm(x)
    q, k, v = (
      projection(normed).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
      for projection in (self.query, self.key, self.value)
    )
    if self.qk_norm:
      q, k = self.query_norm(q), self.key_norm(k)
    if past is not None:
      k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    causal = self.causal and past is None
    heads = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    x = x + self.attention_out(heads.transpose(1, 2).flatten(2))
    normed = self.mlp_norm(x)
    hidden = self.mlp_in(normed)
    if self.gated:
      hidden = hidden * functional.silu(self.mlp_gate(normed))
    else:
      hidden = functional.gelu(hidden, approximate='tanh')
    return x + self.mlp_out(hidden), (k, v)


class Transformer(nn.Module):
  """Layers without a final norm, and what they read: projected tokens plus positions."""

  def __init__(
    self, section: dict[str, Any], model: dict[str, Any], inputs: int, positions: int, causal: bool
  ):
    super().__init__()
    self.in_proj = Dense(inputs, section['width'])
    self.positions = nn.Parameter(torch.zeros(positions, section['width']))
    self.layers = [Layer(section, model, causal) for _ in range(section['layers'])]
    for i, layer in enumerate(self.layers):
      self.add_module(f'layer_{i}', layer)

  def run(self, hidden: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
    """Applies the layers. Also returns the keys and values, for the next token."""
    new: Cache = []
    for i, layer in enumerate(self.layers):
      hidden, entry = layer(hidden, None if cache is None else cache[i])
      new.append(entry)
    return hidden, new


def row_length(model: dict[str, Any], tokens: int) -> int:
  """Returns the number of tokens per row of the image, or 0 without neighborhoods."""
  return math.isqrt(tokens) if model.get('neighborhood') else 0


def neighborhoods(x: Tensor, row: int, count: int) -> Tensor:
  """Returns the inputs of a causal transformer at the last `count` of the tokens x [B, n, d].

  If `row` is 0, the inputs are these tokens, [B, count, d]. Otherwise `row` is the number of tokens
  per row of the image. Each input then also has three neighbors of the token after it, in the row
  above: [B, count, 4·d]. Tokens before the first one are zeros.
  """
  if not row:
    return x[:, x.shape[1] - count :]
  x, first = functional.pad(x, (0, 0, row, 0)), x.shape[1] - count
  return torch.cat([x[:, first + i : first + i + count] for i in (row, min(row, 2), 1, 0)], -1)


class Block(Transformer):
  """A flow block: z = (x - shift) / scale, where a transformer computes shift and scale."""

  causal = True

  def __init__(
    self, section: dict[str, Any], model: dict[str, Any], inputs: int, outputs: int, tokens: int
  ):
    super().__init__(section, model, inputs, tokens, self.causal)
    self.shift_proj = Dense(section['width'], outputs)
    self.log_scale_proj = Dense(section['width'], outputs)
    self.norm, self.bound = RMSNorm(section['width']), section['max_log_scale']

  def affine(
    self, x: Tensor, condition: Tensor | None, first: int = 0, cache: Cache | None = None
  ) -> tuple[Tensor, Tensor, Cache]:
    """Returns shift and log-scale for tokens [B, n, inputs] at positions `first`, …; the cache."""
    hidden = self.in_proj(x) + self.positions[first : first + x.shape[1]]
    if condition is not None:
      hidden = hidden + condition[:, None]
    hidden, cache = self.run(hidden, cache)
    log_scale = self.log_scale_proj(self.norm(hidden))
    if self.bound:
      bounded = self.bound * torch.tanh(log_scale / self.bound)
      log_scale = torch.where(log_scale > 0, bounded, log_scale)
    return self.shift_proj(hidden), log_scale, cache


class AutoregressiveBlock(Block):
  """Transforms each token given the tokens before it, and reverses the order of the tokens."""

  def __init__(self, section: dict[str, Any], model: dict[str, Any], tokens: int, channels: int):
    row = row_length(model, tokens)
    super().__init__(section, model, channels * (4 if row else 1), channels, tokens - 1)
    self.row = row

  def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns z and log|det dz/dx|. The first token does not change."""
    inputs = neighborhoods(x[:, :-1], self.row, x.shape[1] - 1)
    shift, log_scale, _ = self.affine(inputs, condition)
    z = torch.cat([x[:, :1], (x[:, 1:] - shift) * torch.exp(-log_scale)], 1)
    return z.flip(1), -log_scale.sum((1, 2))

  def inverse(self, z: Tensor, condition: Tensor | None) -> Tensor:
    """Inverts `forward` token by token."""
    z = z.flip(1)
    x, cache = z[:, :1], None
    for i in range(1, z.shape[1]):
      inputs = neighborhoods(x, self.row, 1)
      shift, log_scale, cache = self.affine(inputs, condition, i - 1, cache)
      x = torch.cat([x, z[:, i : i + 1] * torch.exp(log_scale) + shift], 1)
    return x


class CouplingBlock(Block):
  """Transforms half of the channels given the other half, and permutes the channels."""

  causal = False

  def __init__(self, section: dict[str, Any], model: dict[str, Any], tokens: int, channels: int):
    super().__init__(section, model, channels - channels // 2, channels // 2, tokens)
    self.read = channels - channels // 2
    self.permutation = channel_permutation(channels, section['blocks'])

  def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns z and log|det dz/dx|."""
    shift, log_scale, _ = self.affine(x[..., : self.read], condition)
    z = (x[..., self.read :] - shift) * torch.exp(-log_scale)
    return torch.cat([x[..., : self.read], z], -1)[..., self.permutation], -log_scale.sum((1, 2))

  def inverse(self, z: Tensor, condition: Tensor | None) -> Tensor:
    """Inverts `forward` in one pass."""
    z = z[..., np.argsort(self.permutation)]
    shift, log_scale, _ = self.affine(z[..., : self.read], condition)
    x = z[..., self.read :] * torch.exp(log_scale) + shift
    return torch.cat([z[..., : self.read], x], -1)


class StudentBlock(Block):
  """A distilled block that inverts one `AutoregressiveBlock` approximately, in one pass."""

  causal = False

  def __init__(
    self, section: dict[str, Any], model: dict[str, Any], tokens: int, channels: int, all_: bool
  ):
    super().__init__(section, model, channels, channels, tokens if all_ else tokens - 1)
    self.all_tokens = all_
    if all_:
      self.first_token_gain = nn.Parameter(torch.zeros(2, channels))

  def inverse(self, z: Tensor, condition: Tensor | None) -> Tensor:
    """Returns the estimate of the input of a flow block with the output z."""
    z = z.flip(1)
    shift, log_scale, _ = self.affine(z if self.all_tokens else z[:, :-1], condition)
    gains = self.first_token_gain if self.all_tokens else (0, 0)  # 0 keeps the first token
    shift, log_scale = (
      torch.cat([gain * a[:, -1:], a[:, :-1] if self.all_tokens else a], 1)
      for a, gain in zip((shift, log_scale), gains, strict=True)
    )
    return z * torch.exp(log_scale) + shift


class Flow(nn.Module):
  """Blocks in sequence. In a student, all blocks only have an `inverse`."""

  def __init__(self, section: dict[str, Any], blocks: list[Any], num_classes: int, channels: int):
    super().__init__()
    self.blocks, order = blocks, np.arange(channels)
    for i, block in enumerate(blocks):
      self.add_module(f'block_{i}', block)
    if section['class_conditional']:
      self.class_embedding = Embedding(num_classes, section['width'])
    self.conditional = section['class_conditional']
    coupling = section['kind'] == 'coupling'
    # Whether latents have the opposite order of tokens from the output of the last block.
    self.flip = not coupling and not section['final_permutation']
    self.reverses = not coupling and len(blocks) % 2 != self.flip  # relative to image tokens
    if coupling:  # Latents have the channels in the order of image tokens.
      for block in blocks:
        order = order[block.permutation]
    self.order = order

  def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns latents [B, N, d] and log|det| of each block, [T, B]."""
    condition, log_dets = self.condition(labels), []
    for block in self.blocks:
      x, log_det = block(x, condition)
      log_dets.append(log_det)
    z = x[..., np.argsort(self.order)]
    return z.flip(1) if self.flip else z, torch.stack(log_dets)

  def inverse(self, z: Tensor, labels: Tensor) -> Tensor:
    """Maps latents to tokens of images."""
    condition = self.condition(labels)
    z = (z.flip(1) if self.flip else z)[..., self.order]
    for block in reversed(self.blocks):
      z = block.inverse(z, condition)
    return z

  def condition(self, labels: Tensor) -> Tensor | None:
    """Returns the class embeddings, or None if the flow does not depend on the class."""
    return self.class_embedding(labels) if self.conditional else None


class Mixture(NamedTuple):
  """Diagonal Gaussian mixtures: log-weights [..., K], means and log-scales [..., K, d]."""

  logits: Tensor
  means: Tensor
  log_scales: Tensor

  def log_prob(self, z: Tensor) -> Tensor:
    """Returns log-densities of points [..., d], whose leading axes broadcast with the mixtures."""
    # The loop keeps memory small: the redundant mixture has hundreds of components.
    parts = [
      normal_log_prob((z - mean) * torch.exp(-log_scale)) - log_scale.sum(-1)
      for mean, log_scale in zip(self.means.unbind(-2), self.log_scales.unbind(-2), strict=True)
    ]
    return torch.logsumexp(torch.log_softmax(self.logits, -1) + torch.stack(parts, -1), -1)

  def sharpen(self, logit_factor: float, scale_factor: float) -> 'Mixture':
    """Multiplies logits and standard deviations."""
    log_scales = self.log_scales + (math.log(scale_factor) if scale_factor else -math.inf)
    return Mixture(self.logits * logit_factor, self.means, log_scales)

  def sample(self, count: int, generator: torch.Generator | None) -> Tensor:
    """Draws [B, count, d] from mixtures [B, K]."""
    chosen = choose(self.logits, count, generator)[..., None]
    means, log_scales = (a.take_along_dim(chosen, -2) for a in self[1:])
    return means + torch.exp(log_scales) * noise_like(means, generator)


class MixtureHead(nn.Module):
  """Maps hidden states to mixtures. Logits and log-scales read normalized hidden states."""

  def __init__(self, width: int, components: int, channels: int, scale_floor: float):
    super().__init__()
    self.norm, self.logits = RMSNorm(width), Dense(width, components)
    self.means, self.log_scales = (Dense(width, components * channels) for _ in range(2))
    self.shape, self.floor = (components, channels), scale_floor

  def forward(self, hidden: Tensor) -> Mixture:
    normed = self.norm(hidden)
    means, log_scales = self.means(hidden), self.log_scales(normed)
    if self.floor:
      log_scales = torch.logaddexp(log_scales, log_scales.new_tensor(math.log(self.floor)))
    logits = self.logits(normed)
    return Mixture(logits, means.unflatten(-1, self.shape), log_scales.unflatten(-1, self.shape))


class Prior(Transformer):
  """The autoregressive prior of the latents, p(z | class)."""

  def __init__(self, model: dict[str, Any], num_classes: int, tokens: int, channels: int):
    section = model['prior']
    informative = section['informative_channels'] or channels
    copies, width = section['condition_copies'], section['width']
    row = row_length(model, tokens)
    super().__init__(section, model, informative * (4 if row else 1), copies + tokens, True)
    self.row = row
    self.class_embedding = Embedding(num_classes, width)
    self.copies, self.tokens, self.sizes = copies, tokens, (informative, channels - informative)
    floor = section['scale_floor']
    self.informative_head = MixtureHead(width, section['components'], informative, floor)
    self.redundant_head = None
    if informative < channels and section['redundant_kind'] == 'mixture':
      components = section['redundant_components']
      self.redundant_head = MixtureHead(width, components, self.sizes[1], floor)

  def mixtures(self, informative: Tensor, labels: Tensor) -> tuple[Mixture, Mixture | None]:
    """Returns mixtures [B, N] of the informative and [B, 1] of the redundant channels (or None)."""
    condition = self.class_embedding(labels)[:, None].expand(-1, self.copies, -1)
    inputs = self.in_proj(neighborhoods(informative, self.row, informative.shape[1]))
    hidden, _ = self.run(torch.cat([condition, inputs], 1) + self.positions)
    shared = self.redundant_head(hidden[:, -1:]) if self.redundant_head else None
    return self.informative_head(hidden[:, self.copies - 1 : -1]), shared

  def log_prob(self, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log-densities in nats: of informative channels [B, N], of redundant channels [B]."""
    informative, redundant = z.split(self.sizes, -1)
    mixtures, shared = self.mixtures(informative, labels)
    log_redundant = shared.log_prob(redundant) if shared else normal_log_prob(redundant)
    return mixtures.log_prob(informative), log_redundant.sum(1)

  def sample(self, labels: Tensor, draws: 'Draws') -> Tensor:
    """Draws latents for labels [S, B]: informative channels token by token, then the redundant."""
    streams, batch = labels.shape
    condition = self.class_embedding(labels.flatten())[:, None] + self.positions[: self.copies]
    hidden, cache = self.run(condition)
    tokens: list[Tensor] = []
    for i in range(self.tokens):
      mixtures = self.informative_head(hidden[:, -1])
      tokens.append(draws.token(_split(mixtures, streams), i, self.tokens))
      inputs = self.in_proj(neighborhoods(torch.cat(tokens, 1), self.row, 1))
      embedded = inputs.repeat(streams, 1, 1) + self.positions[self.copies + i]
      hidden, cache = self.run(embedded, cache)
    if self.redundant_head:
      shared = _split(self.redundant_head(hidden[:, -1]), streams)
      redundant = draws.shared(shared, self.tokens)
    else:
      redundant = draws.normal(hidden.new_empty(batch, self.tokens, self.sizes[1]))
    return torch.cat([torch.cat(tokens, 1), redundant], -1)


class Draws:
  """Draws from mixtures of S streams: one, or "class" and "no class" under guidance.

  Guidance with the scale w draws from a density proportional to p_c^(1 + w) p_u^(-w).
  """

  def __init__(self, sampling: dict[str, Any], generator: torch.Generator | None):
    self.guidance, self.generator = sampling['guidance'], generator
    self.std = sampling['redundant_variance'] ** 0.5
    first, last = self.guidance['scale'], self.guidance['final_scale']
    self.scales = first, first if last is None else last
    self.active = self.guidance['method'] != 'none' and any(self.scales)

  def token(self, streams: list[Mixture], i: int, tokens: int) -> Tensor:
    """Draws the informative channels [B, 1, d_I] of token i."""
    sizes = self.guidance['conditional_candidates'], self.guidance['unconditional_candidates']
    fraction = i / max(tokens - 1, 1)
    scale = self.scales[0] + fraction * (self.scales[1] - self.scales[0])
    return self._draw(streams, scale, 1, sizes, 1.0)

  def shared(self, streams: list[Mixture], tokens: int) -> Tensor:
    """Draws the redundant channels [B, N, d_R] of all tokens."""
    sizes = (self.guidance['redundant_candidates'],) * 2
    return self._draw(streams, self.scales[1], tokens, sizes, self.std)

  def normal(self, like: Tensor) -> Tensor:
    """Draws from a normal distribution with the variance of the redundant channels."""
    return self.std * noise_like(like, self.generator)

  def _draw(
    self, streams: list[Mixture], w: float, count: int, sizes: tuple[int, ...], std: float
  ) -> Tensor:
    """Draws [B, count, d]. `sizes` are the numbers of candidates from the two streams."""
    g = self.guidance
    factors = g['proposal_logit_factor'], g['proposal_scale_factor']
    if len(streams) == 1:
      return streams[0].sharpen(factors[0], factors[1] * std).sample(count, self.generator)
    if g['method'] == 'component':
      return self._component([m.sharpen(*factors) for m in streams], w, count, std)
    proposals = [m.sharpen(factors[0], factors[1] * std) for m in streams]
    pools = [m.sample(n, self.generator) for m, n in zip(proposals, sizes, strict=True)]
    candidates = torch.cat(pools, 1)
    weighing = g['weighing_logit_factor'], g['weighing_scale_factor']
    log_c, log_u = (
      Mixture(*(a[:, None] for a in m.sharpen(*weighing))).log_prob(candidates) for m in streams
    )
    # The density of p' divided by the density from which a candidate was drawn.
    powers = w + (torch.arange(sum(sizes), device=log_c.device) >= sizes[0])
    chosen = choose(g['sharpening'] * powers * (log_c - log_u), count, self.generator)
    return candidates.take_along_dim(chosen[..., None], 1)

  def _component(self, streams: list[Mixture], w: float, count: int, std: float) -> Tensor:
    """Chooses component k by p_c. Draws from the guided product of the Gaussians k."""
    k = choose(streams[0].logits, count, self.generator)[..., None]
    (mean_c, mean_u), scales = ([m[i].take_along_dim(k, 1) for m in streams] for i in (1, 2))
    precision_c, precision_u = (torch.exp(-2 * s) for s in scales)
    precision = (1 + w) * precision_c - w * precision_u
    valid = precision > 0  # Other channels use the Gaussian of p_c.
    precision = torch.where(valid, precision, precision_c)
    product = ((1 + w) * precision_c * mean_c - w * precision_u * mean_u) / precision
    mean = torch.where(valid, product, mean_c)
    return mean + std * noise_like(mean, self.generator) * torch.rsqrt(precision)


class Farmer(nn.Module):
  """The density of images [B, C, H, W], real values in [-1, 1] with noise."""

  basis: Tensor

  def __init__(self, config: dict[str, Any]):
    super().__init__()
    self.data, self.noise, self.sampling = config['data'], config['noise'], config['sampling']
    model, self.distill = config['model'], config['distill']
    check(model)
    self.patch, self.num_classes = model['patch_size'], self.data['num_classes']
    self.tokens = (self.data['image_size'] // self.patch) ** 2
    self.channels = self.data['channels'] * self.patch**2
    basis = np.eye(self.channels)
    if model['patch_basis'] == 'dct':
      basis = dct_basis(self.patch, self.data['channels'])
    self.register_buffer('basis', torch.tensor(basis, device='cpu'), persistent=False)
    section, sizes = model['flow'], (self.tokens, self.channels)
    kind = CouplingBlock if section['kind'] == 'coupling' else AutoregressiveBlock
    self.flow = self._flow(section, lambda s: kind(s, model, *sizes))
    self.prior = None
    if model['prior']['kind'] == 'mixture':
      self.prior = Prior(model, self.num_classes, *sizes)
    self.student = None
    if config['teacher'] is not None:
      small = {k: self.distill[k] or section[k] for k in ('layers', 'width')}
      all_tokens = self.distill['all_tokens']
      self.student = self._flow(
        section | small, lambda s: StudentBlock(s, model, *sizes, all_tokens)
      )

  def _flow(self, section: dict[str, Any], block: Callable[[dict[str, Any]], Any]) -> Flow | None:
    blocks = [block(section) for _ in range(section['blocks'])]
    return Flow(section, blocks, self.num_classes, self.channels) if blocks else None

  def log_prob(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Returns log p(image | class) in nats, [B]."""
    return torch.cat(list(self.terms(images, labels).values()), 1).sum(1)

  def terms(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Returns the terms of `log_prob`: `informative` [B, N], `redundant` [B, 1], `log_dets` [B, T].

    `informative` is in the order of the tokens of the image.
    """
    z, log_dets = self.encode(images, labels)
    if self.prior is None:
      informative, redundant = normal_log_prob(z), z.new_zeros(len(z))
    else:
      informative, redundant = self.prior.log_prob(z, self._labels(labels, z))
    if self.flow and self.flow.reverses:
      informative = informative.flip(1)
    return dict(informative=informative, redundant=redundant[:, None], log_dets=log_dets.T)

  def encode(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns latents [B, N, d] and the log-determinants of the flow blocks [T, B]."""
    side = images.shape[-1] // self.patch
    x = images.unflatten(3, (side, -1)).unflatten(2, (side, -1))  # [B, C, side, p, side, p]
    x = x.permute(0, 2, 4, 3, 5, 1).reshape(len(images), self.tokens, self.channels)
    x = x @ self.basis.T
    return self.flow(x, self._labels(labels, x)) if self.flow else (x, x.new_zeros(0, len(x)))

  def decode(self, z: Tensor, labels: Tensor | None = None, student: bool = False) -> Tensor:
    """Returns the images of latents. With `student`, approximately, in one pass per block."""
    flow: Flow | None = self.student if student else self.flow
    x = flow.inverse(z, self._labels(labels, z)) if flow else z
    side, patch = self.data['image_size'] // self.patch, (self.patch, self.patch, -1)
    x = (x @ self.basis).unflatten(2, patch).unflatten(1, (side, side))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(z), -1, *(self.data['image_size'],) * 2)

  @torch.no_grad()
  def sample_latents(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws latents from the prior, with guidance."""
    if labels is None:
      raise ValueError(
        'sampling needs one label per image; for images of "no class", pass'
        f' torch.full((count,), {self.num_classes})'
      )
    draws = Draws(self.sampling, generator)
    if self.prior is None:
      return draws.normal(self.basis.new_empty(len(labels), self.tokens, self.channels))
    no_class = torch.full_like(labels, self.num_classes)
    return self.prior.sample(torch.stack([labels, no_class][: 1 + draws.active]), draws)

  @torch.no_grad()
  def sample(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws one image per label, with the settings `self.sampling`. See `to_uint8`."""
    z = self.sample_latents(labels, generator)
    student = self.sampling['inverse'] == 'student'
    if student and self.sampling['refinement_rounds']:
      raise ValueError("refinement is not implemented; set sampling['refinement_rounds'] = 0")
    images = self.decode(z, labels, student)
    denoised = student and self.distill['denoise']
    return self.denoise(images, labels) if self.sampling['denoise'] and not denoised else images

  def denoise(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Returns x + σ² ∇ log p(x), the expected image without noise (Tweedie's formula)."""
    with torch.enable_grad():
      x = images.detach().requires_grad_()
      (score,) = torch.autograd.grad(self.log_prob(x, labels).sum(), x)
    return images + self.noise['std_end'] ** 2 * score

  def from_uint8(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Adds the noise of evaluation to 8-bit images. `log_prob` is the density of the result."""
    values = images.to(self.basis.dtype)
    if self.noise['kind'] == 'gaussian':
      return values / 127.5 - 1 + self.noise['std_end'] * noise_like(values, generator)
    uniform = torch.rand(
      values.shape, generator=generator, dtype=values.dtype, device=values.device
    )
    return (values + uniform) / 128 - 1

  def to_uint8(self, values: Tensor) -> Tensor:
    """Returns 8-bit images."""
    gaussian = self.noise['kind'] == 'gaussian'
    levels = torch.round((values + 1) * 127.5) if gaussian else torch.floor((values + 1) * 128)
    return levels.clamp(0, 255).to(torch.uint8)

  def _labels(self, labels: Tensor | None, like: Tensor) -> Tensor:
    if labels is None:
      return torch.full((len(like),), self.num_classes, device=like.device)
    return labels.to(like.device)


def normal_log_prob(z: Tensor) -> Tensor:
  """Returns log-densities under standard normals, summed over the last axis."""
  return -0.5 * (z.square() + LOG_2PI).sum(-1)


def choose(logits: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
  """Draws `count` indices [B, count] with the weights softmax(logits), [B, K]."""
  return torch.multinomial(torch.softmax(logits, -1), count, True, generator=generator)


def noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
  """Draws standard normals with the shape, the dtype and the device of `x`."""
  return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _split(mixtures: Mixture, streams: int) -> list[Mixture]:  # [S·B, …] -> S times [B, …]
  return [Mixture(*parts) for parts in zip(*(a.chunk(streams) for a in mixtures), strict=True)]


def dct_basis(patch: int, channels: int) -> np.ndarray:
  """Returns the orthonormal basis [d, d] of patches: rows are products of cosines and colors."""
  n = np.arange(patch)
  cosines = np.sqrt(2 / patch) * np.cos(np.pi * (n + 0.5) * n[:, None] / patch)
  cosines[0] /= np.sqrt(2)
  colors = np.eye(channels)
  if channels == 3:
    colors = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
  basis = np.einsum('ap,bq,kc->abkpqc', cosines, cosines, colors)
  row, column, color = np.indices((patch, patch, channels))
  frequency = row + column + (patch / 2) * (color > 0)
  return basis.reshape(frequency.size, -1)[np.argsort(frequency.ravel(), kind='stable')]


def channel_permutation(channels: int, blocks: int) -> np.ndarray:
  """Returns the permutation of coupling blocks: the input channel of each output channel."""
  rng, num_changed = np.random.RandomState(0), channels // 2
  num_read = channels - num_changed
  first, second = rng.permutation(num_read), num_read + rng.permutation(num_changed)
  a = (num_read + 1) // 3 if blocks > 2 else channels % 2
  b = a - channels % 2
  permutation = np.empty(channels, int)
  permutation[first[a : 2 * a]], permutation[second[b : 2 * b]] = first[:a], second[:b]
  permutation[np.delete(second, np.s_[b : 2 * b])] = rng.permutation(first[a:])
  permutation[np.delete(first, np.s_[a : 2 * a])] = rng.permutation(second[b:])
  return permutation
