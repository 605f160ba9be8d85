"""Copies first_cell.py into the notebooks, and drops outputs from them."""

import pathlib

import nbformat

HERE = pathlib.Path(__file__).resolve().parent


def first_cell():
  """Return the text of the cell: first_cell.py without its docstring."""
  text = (HERE / 'first_cell.py').read_text(encoding='utf-8')
  return text.split('"""\n', 1)[1].strip()


def refresh(path):
  """Write a notebook again: first cell copied, no outputs."""
  book = nbformat.read(path, 4)
  code = [c for c in book.cells if c.cell_type == 'code']
  code[0].source = first_cell()
  # Shown as a form, its code on demand.
  code[0].metadata = {'cellView': 'form', 'jupyter': {'source_hidden': True}}
  for i, cell in enumerate(book.cells):
    cell.id = f'cell-{i:02d}'
    if cell.cell_type == 'code':
      cell.outputs, cell.execution_count = [], None
  nbformat.validate(book)
  path.write_text(nbformat.writes(book) + '\n', encoding='utf-8')


if __name__ == '__main__':
  for notebook in sorted(HERE.glob('*.ipynb')):
    refresh(notebook)
