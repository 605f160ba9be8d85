"""Markdown tables."""


def markdown(head, lines, aligned=False):
  """Return a Markdown table, a line of text each row, ending in a newline.

  Args:
    head: list of column titles.
    lines: lists of as many texts.
    aligned: pad the cells, so that columns also align as plain text.
  """
  rows = [head, *lines]
  widths = [max(len(row[i]) for row in rows) if aligned else 0
            for i in range(len(head))]
  line = lambda row: '| ' + ' | '.join(
      cell.ljust(width) for cell, width in zip(row, widths)) + ' |\n'
  rule = '|' + '|'.join('-' * max(width + 2, 3) for width in widths) + '|\n'
  return line(head) + rule + ''.join(map(line, lines))
