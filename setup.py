"""Everything is declared in pyproject.toml. This file exists for builds of the native library, and imports no torch."""

from setuptools import setup

setup()
