"""Checks all links of the built site.

Internal links, pictures, and scripts must exist, and so must the anchors. Links to other hosts must
be https URLs; they are not opened. Pages must not load anything from other hosts.

    python -m docs._site.check_links site
"""

import html.parser
import pathlib
import re
import sys
import urllib.parse
from collections.abc import Iterator

_EXTERNAL_URL = re.compile(
  r'https://[\w-]+(\.[\w-]+)+(:\d+)?(/[\w./%~+@!$&\',;=:()-]*)?(\?\S*)?(#\S*)?'
)


class _Page(html.parser.HTMLParser):
  """Links and anchors of a page."""

  def __init__(self, file: pathlib.Path):
    super().__init__()
    self.anchors: set[str] = set()
    self.links: list[tuple[str, str]] = []  # element, URL
    self.feed(file.read_text())

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    values = dict(attrs)
    self.anchors |= {values[name] or '' for name in ('id', 'name') if name in values}
    url = values.get('href', values.get('src'))
    # The theme has links that open a dialog.
    if url is not None and not url.startswith('javascript:'):
      self.links.append((tag, url))


def broken_links(site: pathlib.Path) -> Iterator[str]:
  """Yields a line for each broken link of the pages in the folder `site`."""
  pages = {file: _Page(file) for file in sorted(site.resolve().rglob('*.html'))}
  for file, page in pages.items():
    for tag, url in page.links:
      if reason := _problem(file, tag, url, pages):
        yield f'{file.relative_to(site.resolve())}: {url}: {reason}'


def _problem(
  file: pathlib.Path, tag: str, url: str, pages: dict[pathlib.Path, _Page]
) -> str | None:
  parts = urllib.parse.urlsplit(url)
  if parts.scheme or parts.netloc:
    if tag != 'a':
      return 'loads a file from another host'
    return None if _EXTERNAL_URL.fullmatch(url) else 'is not a valid https URL'
  # Pages that are served for missing URLs have absolute links.
  path = urllib.parse.unquote(parts.path)
  root = file.parents[0] if file.name == '404.html' else file.parent
  target = (root / path.lstrip('/')).resolve() if path else file
  target = target / 'index.html' if target.is_dir() else target
  if not target.is_file():
    return 'no such file'
  anchor = urllib.parse.unquote(parts.fragment)
  if anchor and target in pages and anchor not in pages[target].anchors:
    return 'no such anchor'
  return None


if __name__ == '__main__':
  problems = list(broken_links(pathlib.Path(sys.argv[1])))
  print('\n'.join(problems), end='\n' if problems else '')
  sys.exit(bool(problems))
