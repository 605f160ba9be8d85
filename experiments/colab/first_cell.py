"""The first cell of every notebook: finds mtp_rl, or fetches and installs it.

This is its one home: `python experiments/colab/copy_first_cell.py` copies it,
without this text, into the notebooks.
"""
# @title Find mtp_rl, or fetch and install it
import importlib
import importlib.metadata
import pathlib
import subprocess
import sys

from packaging.requirements import Requirement

# Where the sources come from if no checkout is near (experiments/README.md).
REPOSITORY = 'ADDRESS-OF-THE-REPOSITORY'  # @param {type:"string"}


def find_checkout():
  """Return the checkout above this folder, or the one fetched here."""
  here = pathlib.Path.cwd()
  for place in (here, *here.parents, here / 'mtp_rl_checkout'):
    if all((place / x).exists() for x in ('pyproject.toml', 'mtp_rl/occ.py')):
      return place


def fetch():
  """Return a new checkout in this folder."""
  if REPOSITORY.startswith('ADDRESS'):
    raise SystemExit('No checkout of mtp_rl is here: start the notebook inside '
                     'one, or set REPOSITORY above to its address.')
  print('fetching', REPOSITORY)
  path = pathlib.Path.cwd() / 'mtp_rl_checkout'
  subprocess.run(['git', 'clone', '-q', '--depth=1', REPOSITORY, str(path)],
                 check=True)
  return path


def installed():
  """Return {package: version} of what is installed."""
  importlib.invalidate_caches()
  return {d.name.lower().replace('_', '-'): d.version
          for d in importlib.metadata.distributions()}


def install(checkout):
  """Install what mtp_rl needs and is not here; say if that needs a restart."""
  if sys.version_info < (3, 11):  # noqa: UP036
    raise SystemExit('mtp_rl needs Python 3.11 or newer.')
  import tomllib
  before = installed()
  project = tomllib.loads((checkout / 'pyproject.toml').read_text())['project']
  needs = [Requirement(x) for x in project['dependencies']]
  lacks = [x.name for x in needs if not x.specifier.contains(
      before.get(x.name.lower().replace('_', '-'), '0'), prereleases=True)]
  if not lacks:
    return
  of = importlib.metadata.packages_distributions()
  loaded = {x.lower().replace('_', '-') for name in list(sys.modules)
            for x in of.get(name, ())}
  print('installing', ', '.join(lacks))
  subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '-c',
                  str(checkout / 'constraints.txt'), '-e', str(checkout)],
                 check=True)
  now = installed()
  if old := sorted(x for x in loaded if before.get(x) != now.get(x)):
    raise SystemExit('Restart the kernel (Colab: Runtime, Restart session) and '
                     'run this cell again: older versions of '
                     f'{", ".join(old)} are still loaded.')


checkout = find_checkout() or fetch()
install(checkout)
if str(checkout) not in sys.path:
  sys.path.insert(0, str(checkout))
print('mtp_rl is at', checkout)
