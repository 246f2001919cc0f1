"""The documents of the repository: their text, code blocks, commands, and links."""

import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob('*.md')), *sorted((ROOT / 'docs').rglob('*.md'))]
# Files whose comments and docstrings contain commands, too.
SOURCES = [*(ROOT / 'launch').iterdir()]
for _folder in ('benchmarks', 'configs', 'farmer_jax'):
  SOURCES += sorted((ROOT / _folder).rglob('*.py'))

_BLOCK = re.compile(r'(?ms)^(?:<!-- run(?P<run>:[^\n]*)? -->\n)?```(\w*)\n(.*?)^```$')
_COMMAND = re.compile(
  r'(?:python -m farmer_jax\.main|(?<![\w./-])farmer_jax'
  r'|launch/(?:local\.sh \d+|\w+\.(?:sh|sbatch)))'
  r'((?: +(?:…|--?\w[\w.]*(?:="[^"\n]*"|=[^\s`\'"|]*)?))+)'
)
_LINK = re.compile(r'\]\(([^)\s]+)\)')


class Block(NamedTuple):
  """A fenced code block. `run` is None, or the text after the mark <!-- run: … -->."""

  run: str | None
  language: str
  code: str


def blocks(page: pathlib.Path) -> list[Block]:
  found = _BLOCK.finditer(page.read_text())
  marked = ((m[0].startswith('<!--'), (m['run'] or '').strip(': '), m) for m in found)
  return [Block(run if is_marked else None, m[2], m[3]) for is_marked, run, m in marked]


def commands(text: str) -> list[list[str]]:
  """Returns the arguments of all calls of `farmer_jax.main`, also by scripts of launch/."""
  joined = re.sub(r'\\{1,2}\n\s*#?\s*', '', text)
  return [found[1].replace('"', '').split() for found in _COMMAND.finditer(joined)]


def prose(page: pathlib.Path) -> str:
  """Returns the text of a page without code blocks."""
  return re.sub(r'(?m)^    .*$', '', _BLOCK.sub('', page.read_text()))


def links(page: pathlib.Path) -> Iterator[str]:
  """Yields the targets of all links to files and anchors of the repository."""
  text = re.sub(r'`[^`\n]*`', '', prose(page))
  yield from (url for url in _LINK.findall(text) if not re.match(r'[a-z]+:', url))


def anchors(page: pathlib.Path) -> set[str]:
  """Returns the anchors of the headings of a page, as on GitHub."""
  headings = re.findall(r'(?m)^#+ (.+)$', _BLOCK.sub('', page.read_text()))
  plain = (re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading).lower() for heading in headings)
  return {re.sub(r'[^\w\- ]', '', heading).replace(' ', '-') for heading in plain}


def keys(page: pathlib.Path, sections: set[str]) -> Iterator[tuple[str, str | None]]:
  """Yields (key, value or None) for the keys of the configuration in code style.

  In a table whose first column is, for example, `--config.sampling.`, keys have this prefix.
  """
  prefix = ''
  for line in prose(page).splitlines():
    if header := re.match(r'\| `--config\.([\w.]+)\.` \|', line):
      prefix = f'{header[1]}.'
    elif not line.startswith('|'):
      prefix = ''
    cells = line.split(' | ')
    for code in ' '.join(re.findall(r'`([^`]+)`', line)).split():
      found = re.fullmatch(r'(?:--config\.)?([a-z_][\w.]*)(?:=(.*))?', code)
      if not found or header:
        continue
      key = found[1]
      if prefix and f'`{code}`' in cells[0] and found[2] is not None:
        key = prefix + key
      is_file = key.rpartition('.')[2] in ('py', 'json', 'md', 'jsonl')
      if '.' in key and key.partition('.')[0] in sections and not is_file:
        yield key, found[2]
