"""Execution of notebooks/tour.py, and conversion of the executed notebook to a page of the site.

python -m docs._site.notebook
"""

import base64
import itertools
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]


def to_markdown(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
  """Returns the page, and the pictures by file name. Output follows the code that prints it."""
  parts: list[str] = []
  pictures: dict[str, bytes] = {}
  for cell in notebook['cells']:
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown':
      parts.append(source)
      continue
    parts.append(f'```python\n{source}\n```')
    for is_text, group in itertools.groupby(
      cell['outputs'], lambda o: o['output_type'] == 'stream'
    ):
      outputs = list(group)
      if is_text:
        text = ''.join(line for output in outputs for line in output['text'])
        parts.append(f'```text\n{text.rstrip()}\n```')
      for output in outputs:
        if 'image/png' in output.get('data', {}):
          name = f'tour_{len(pictures)}.png'
          pictures[name] = base64.b64decode(''.join(output['data']['image/png']))
          parts.append(f'![Output of the code above]({name})')
  return '\n\n'.join(parts) + '\n', pictures


def read(file: pathlib.Path) -> Any:
  """Returns a notebook without outputs from a Python file. Cells have numbers as their names."""
  # The site shows the notebook without these packages.
  import jupytext

  notebook = jupytext.read(file)
  for number, cell in enumerate(notebook.cells):
    cell['id'] = f'cell-{number}'
  notebook.metadata.pop('jupytext', None)
  return notebook


def execute(file: pathlib.Path, timeout_seconds: int = 600) -> Any:
  """Returns the executed notebook of a Python file. Warnings and progress are left out."""
  import nbclient

  notebook = read(file)
  client = nbclient.NotebookClient(
    notebook,
    timeout=timeout_seconds,
    record_timing=False,
    resources={'metadata': {'path': str(file.parent)}},
  )
  client.execute()
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
  # The version of Python, which differs between machines.
  notebook.metadata.pop('language_info', None)
  return notebook


if __name__ == '__main__':
  import nbformat

  source = ROOT / 'notebooks' / 'tour.py'
  nbformat.write(execute(source), source.with_suffix('.ipynb'))
