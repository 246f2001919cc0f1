"""Conversion of an executed notebook to Markdown and pictures."""

import base64
from typing import Any


def to_markdown(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
  """Returns the page, and the pictures by file name. Code and its output alternate."""
  parts: list[str] = []
  pictures: dict[str, bytes] = {}
  for cell in notebook['cells']:
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown':
      parts.append(source)
      continue
    parts.append(f'```python\n{source}\n```')
    for output in cell['outputs']:
      data = output.get('data', {'text/plain': output.get('text', [])})
      if picture := data.get('image/png'):
        name = f'tour_{len(pictures)}.png'
        pictures[name] = base64.b64decode(''.join(picture))
        alternative = cell['metadata'].get('alt', 'Output of the code above')
        parts.append(f'![{alternative}]({name})')
      elif text := ''.join(data['text/plain']).rstrip():
        parts.append(f'```text\n{text}\n```')
  return '\n\n'.join(parts) + '\n', pictures
