# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Sphinx configuration: ``sphinx-build docs/en docs/en/_build``."""
import re
from pathlib import Path

scope: dict = {}
exec(
    Path(__file__).parents[2].joinpath('mmseg_textkd',
                                       'version.py').read_text(), scope)

project = 'mmseg_textkd'
author = 'mmseg_textkd contributors'
copyright = author
release = scope['__version__']
version = release

extensions = ['myst_parser', 'sphinx_copybutton']
myst_enable_extensions = ['dollarmath']
# Links to headings, as on a code host.
myst_heading_anchors = 3
exclude_patterns = ['_build']
html_title = f'{project} {release}'


def drop_links_to_readme(app, docname, source):
    """Keep the words of links that lead out of the documentation.

    The README is for readers of the repository, where they work.
    """
    source[0] = re.sub(r'\[([^\]]+)\]\((?:\.\./)+README\.md[^)]*\)', r'\1',
                       source[0])


def setup(app):
    """Register what is above with Sphinx."""
    app.connect('source-read', drop_links_to_readme)
