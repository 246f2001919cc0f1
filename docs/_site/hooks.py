"""Hooks of MkDocs: generated reference pages, and links that work on GitHub and on the site.

Generated pages do not exist in docs/. Other pages link to the file of the repository that a
generated page shows, for example ../CHANGELOG.md, and `on_page_markdown` replaces these links.
"""

import json
import pathlib
import posixpath
import re
import sys
from collections.abc import Iterator
from typing import Any

from mkdocs.structure import files as files_lib

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from docs._site import config_reference, notebook  # noqa: E402

# Pages of the site, by the path in the repository to which other pages link.
_PAGES = {
  'CHANGELOG.md': 'changelog.md',
  'CONTRIBUTING.md': 'contributing.md',
  'README.md': 'README.md',
  'farmer_jax/api.py': 'reference/python_api.md',
  'farmer_jax/config/sections': 'reference/config.md',
  'farmer_jax/main.py': 'reference/command_line.md',
  'notebooks/tour.ipynb': 'notebooks/tour.md',
}
# Pages that are files of the root.
_COPIES = {'changelog.md': 'CHANGELOG.md', 'contributing.md': 'CONTRIBUTING.md'}
# Pages of modules: title, and the modules or packages with all their modules.
_MODULES = {
  'config': ('Configuration', ['config', 'errors']),
  'sampling': ('Sampling', ['sampling']),
  'nn': ('Neural networks', ['nn']),
  'ops': ('Array functions', ['ops']),
  'losses': ('Losses and noise', ['losses', 'noise', 'teacher']),
  'evaluation': ('Evaluation', ['evaluation']),
  'training': ('Training', ['training']),
  'data': ('Data', ['data']),
  'checkpoints': ('Checkpoints', ['checkpoints']),
  'workdir': ('Workdirs and exports', ['workdir', 'exports']),
  'distributed': ('Processes and devices', ['distributed']),
  'xla': ('Compiler output', ['xla']),
  'jobs': ('Jobs', ['jobs']),
}
# Links and images, and before them fenced code, in which nothing is replaced.
_LINKS = re.compile(r'(?ms)^```.*?^```|(!?\[(?:[^][]|\[[^][]*\])*\])\(([^)\s]+)\)')
_CODE = re.compile(
  r'(?s)<a\b.*?</a>|<h\d.*?</h\d>|<pre\b.*?</pre>|<code>((?:--config\.)?([\w.]+)(?:=[^<]*)?)</code>'
)


def on_files(files: files_lib.Files, config: Any) -> files_lib.Files:
  """Adds the generated pages and the pictures of the notebook."""

  def add(name: str, content: str | bytes) -> None:
    files.append(files_lib.File.generated(config, name, content=content))

  for name, source in _COPIES.items():
    # Python-Markdown needs four spaces before the content of list items.
    add(name, re.sub(r'(?m)^  (?=\S)', '    ', (ROOT / source).read_text()))
  add('reference/config.md', config_reference.keys_page())
  add('reference/command_line.md', config_reference.flags_page())
  add('reference/python_api.md', _python_api())
  for name, (title, modules) in _MODULES.items():
    add(f'reference/modules/{name}.md', _modules_page(title, modules))
  page, pictures = notebook.to_markdown(json.loads((ROOT / 'notebooks/tour.ipynb').read_text()))
  add('notebooks/tour.md', page)
  for name, picture in pictures.items():
    add(f'notebooks/{name}', picture)
  return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
  """Replaces links to files of the repository by links to pages, or by their text.

  Links of other generated pages are links to pages.
  """
  page_file = page.file.src_uri
  if page_file == 'README.md':
    page.meta['hide'] = ['navigation']
  if page_file in _COPIES:
    here = ''
  elif (ROOT / 'docs' / page_file).exists():
    here = posixpath.dirname(f'docs/{page_file}')
  else:
    return markdown

  def replace(match: re.Match) -> str:
    text, url = match[1], match[2]
    if text is None or re.match(r'[a-z]+:|#', url):
      return match[0]
    path, hash_, anchor = url.partition('#')
    target = posixpath.normpath(posixpath.join(here, path))
    site = _PAGES.get(target, target.removeprefix('docs/') if target.startswith('docs/') else None)
    if site is None:
      return text.removeprefix('[').removesuffix(']')
    return f'{text}({posixpath.relpath(site, posixpath.dirname(page_file) or ".")}{hash_}{anchor})'

  return _LINKS.sub(replace, markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
  """Links the names of configuration keys to the reference.

  In a table whose first column is, for example, `--config.sampling.`, keys have this prefix.
  """
  known = config_reference.anchors()
  page_reference = posixpath.relpath('reference/config.html', posixpath.dirname(page.url) or '.')

  def replace(match: re.Match) -> str:
    text, key = match[1], match[2]
    if not text or page.file.src_uri == 'reference/config.md':
      return match[0]
    table = html[: match.start()].rpartition('<table>')[2]
    prefix = re.search(r'<th><code>--config\.([\w.]+\.)</code>', table)
    if prefix and '</table>' not in table and ('.' not in key or key not in known):
      key = prefix[1] + key
    if '.' not in key or key not in known:
      return match[0]
    return f'<a class="key" href="{page_reference}#{key}"><code>{text}</code></a>'

  return _CODE.sub(replace, html)


def _python_api() -> str:
  members = ''.join(
    f'\n::: farmer_jax.api.{name}\n    options: {{show_root_full_path: false}}\n'
    for name in ('load', 'Run', 'LogProb')
  )
  return (
    '# Python API\n\n`farmer_jax.load` opens a trained run. `Run` and `LogProb` are also names of'
    f' `farmer_jax`. The [notebook](../notebooks/tour.md) uses all of them.\n{members}'
  )


def _modules_page(title: str, names: list[str]) -> str:
  lines = [f'# {title}\n']
  for name in names:
    lines += [f'::: farmer_jax.{module}\n' for module in _module_names(name)]
  return '\n'.join(lines)


def _module_names(name: str) -> Iterator[str]:
  """Yields a module, or all modules of a package, without links to examples."""
  files = sorted((ROOT / 'farmer_jax' / name).glob('[!_]*.py'))
  files = [file for file in files if not file.is_symlink()]
  yield from (f'{name}.{file.stem}' for file in files)
  if not files:
    yield name
