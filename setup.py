"""For tools that ask for a setup.py; all metadata is in pyproject.toml."""

import setuptools

setuptools.setup()
