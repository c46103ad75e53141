"""Finds the packages, so that no configuration group or sub-package can be forgotten; the rest is in pyproject.toml."""

from setuptools import find_namespace_packages, find_packages, setup

conf = ["lightning_fscreen.conf"] + [
    f"lightning_fscreen.conf.{group}" for group in find_namespace_packages("conf", exclude=["*__pycache__*"])
]

setup(packages=find_packages(include=["lightning_fscreen", "lightning_fscreen.*"]) + conf)
