# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Sphinx configuration of all languages; see docs/en/conf.py.

Pages that live elsewhere in the repository (the READMEs of the methods, the
results) are copied into the source folder of the site when it is built, with
their links turned; links to files that are no page lead to the repository.
"""
import os
import posixpath
import re
import warnings
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
# Where the repository is published; the badges of the notebook have it too.
REPOSITORY = 'https://github.com/OWNER/mmseg_textkd'

scope: dict = {}
exec((ROOT / 'mmseg_textkd' / 'version.py').read_text(), scope)

project = 'mmseg_textkd'
author = 'mmseg_textkd contributors'
copyright = author
release = version = scope['__version__']

extensions = [
    'myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx_copybutton'
]
myst_enable_extensions = ['dollarmath']
# Links to headings, as on a code host.
myst_heading_anchors = 3
suppress_warnings = ['myst.header']  # READMEs begin below a badge
exclude_patterns = ['_build', 'jupyter_execute']
html_theme = 'furo'
html_title = f'{project} {release}'
# NamedTuples have members of the same names.
napoleon_use_ivar = True
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
autodoc_default_options = dict(members=True, undoc_members=False)
# What the notebook prints is made when the site is built.
nb_execution_mode = os.environ.get('NOTEBOOKS', 'force')
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

# Pages from elsewhere, by their place on the site.
PAGES = {
    f'methods/{path.parent.name}': path
    for path in sorted(ROOT.glob('configs/*/README.md'))
}
PAGES.update(
    (f'results/{"index" if path.stem == "README" else path.stem}', path)
    for path in sorted(ROOT.glob('docs/results/*.md')))
PAGES['contributing'] = ROOT / 'CONTRIBUTING.md'
PAGES['released_models'] = ROOT / 'model_zoo/README.md'
ZOO = """# Model zoo

All configs for which a method is described. Those with weights are the
[released models](released_models.md), which load by name. The others: train
with `python tools/train.py CONFIG`, fold and
[publish](user_guides/release.md). What has been measured is under
[results](results/index.md), what each network costs under
[networks](networks.md).
"""


def model_zoo() -> str:
    """Write the page of all models, from the metafiles of the configs."""
    parts = [ZOO]
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    for name in index['Import']:
        meta = yaml.safe_load((ROOT / name).read_text())
        where = Path(name).parent.name
        title = meta['Collections'][0]['Name']
        page = (f'methods/{where}.md' if f'methods/{where}' in PAGES else None)
        rows = []
        for model in meta['Models']:
            measured = model.get('Results', {}).get('Metrics', {})
            results = '; '.join(f'{k} {v}' for k, v in measured.items())
            weights = model.get('Weights')
            rows.append('| [{}]({}/blob/main/{}) | {} | {} | {} |'.format(
                model['Name'], REPOSITORY, model['Config'],
                model['Metadata'].get('Training Data', ''), results
                or 'not measured',
                f'[model]({REPOSITORY}/blob/main/{weights})'
                if weights else '—'))
        parts.append(f'## {f"[{title}]({page})" if page else title}\n\n'
                     '| config | data | results | weights |\n'
                     '|---|---|---|---|\n' + '\n'.join(rows) + '\n')
    return '\n'.join(parts)


def turn_links(text: str, source: Path, docname: str, folder: Path) -> str:
    """Turn the links of a page to where they lead from the site.

    Args:
        text (str): Markdown.
        source (Path): The file that it comes from.
        docname (str): Its place on the site.
        folder (Path): Source folder of the site.

    Returns:
        str: Markdown with links to pages of the site, or to the repository.
    """
    pages = {}
    if folder.name == 'en':
        pages = {path: name for name, path in PAGES.items()}
        pages[ROOT / 'README.md'] = 'index'
    here = posixpath.dirname(docname)

    def turn(match: re.Match) -> str:
        mark, label, target = match.groups()
        path, hash_mark, anchor = target.partition('#')
        if not path or re.match(r'[a-z]+:', path) or '<' in path:
            return match[0]
        file = Path(os.path.normpath(source.parent / path))
        if not file.is_relative_to(ROOT):
            return match[0]
        name = pages.get(file)
        if (name is None and file.suffix in ('.md', '.ipynb')
                and file.is_relative_to(folder)):
            name = file.relative_to(folder).with_suffix('').as_posix()
        if name:
            suffix = '.ipynb' if file.suffix == '.ipynb' else '.md'
            link = posixpath.relpath(name, here or '.') + suffix
            if name == 'index':
                hash_mark = anchor = ''
        elif mark:
            link = os.path.relpath(file, folder / here)
        else:
            link = f'{REPOSITORY}/blob/main/{file.relative_to(ROOT)}'
        return f'{mark}[{label}]({link}{hash_mark}{anchor})'

    pattern = r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)'
    return ''.join(
        part if part.startswith('```') else re.sub(pattern, turn, part)
        for part in re.split(r'(```.*?```)', text, flags=re.S))


def copy_pages(app, config) -> None:
    """Bring the pages from elsewhere into the source folder."""
    folder = Path(app.srcdir)
    if folder.name != 'en':
        return
    files = {
        name: turn_links(path.read_text(encoding='utf-8'), path, name, folder)
        for name, path in PAGES.items()
    }
    files['model_zoo'] = model_zoo()
    for name, text in files.items():
        path = folder / f'{name}.md'
        path.parent.mkdir(exist_ok=True)
        if not path.is_file() or path.read_text(encoding='utf-8') != text:
            path.write_text(text, encoding='utf-8')


def turn_own_links(app, docname, source) -> None:
    """Turn the links of the pages that live here."""
    folder = Path(app.srcdir)
    path = folder / f'{docname}.md'
    if docname not in PAGES and docname != 'model_zoo' and path.is_file():
        source[0] = turn_links(source[0], path, docname, folder)


def setup(app) -> None:
    """Register what is above with Sphinx."""
    # The imports of autodoc are not the reader's business.
    warnings.simplefilter('ignore')
    app.connect('config-inited', copy_pages)
    app.connect('source-read', turn_own_links)
