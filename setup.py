# Copyright (c) mmseg_textkd contributors. All rights reserved.
import os
import os.path as osp
import re
import shutil
import warnings
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from typing import List

ROOT = osp.dirname(osp.abspath(__file__))
PACKAGE = 'mmseg_textkd'
# What `mim train/test/run mmseg_textkd` looks for in `mmseg_textkd/.mim`.
MIM_FILES = ('configs', 'tools', 'model-index.yml')
# Of these only what works without a checkout of the repository.
CHECKOUT_ONLY = ('build_docs.sh', 'lint.sh', 'model_index.py',
                 'networks.md.in', 'networks.py', 'parity', 'quickstart.py',
                 'quickstart.sh', 'run_tests.sh', 'runtimes.py',
                 'scheduled_newest.sh', 'setup_env.sh', 'study_slice.sh',
                 'test_page.sh', 'test_runtimes.sh', 'toy_clip')
# A link or an image of Markdown that is no address.
RELATIVE = re.compile(r'(!?)\[((?:!\[[^\]]*\]\([^)]*\)|[^][])*)\]'
                      r'\((?!\w+:|#)([^)]+)\)')


def read(path: str) -> str:
    """Read a text file of this repository.

    Args:
        path (str): Path below the root of the repository.

    Returns:
        str: The text, or an empty one if there is no such file.
    """
    path = osp.join(ROOT, path)
    if not osp.isfile(path):
        return ''
    with open(path, encoding='utf-8') as file:
        return file.read()


def repository() -> str:
    """Read the address of the repository; '' while there is none."""
    found = re.search(r'^repository-code: *[\'"]?([^\s\'"]+)',
                      read('CITATION.cff'), re.MULTILINE)
    return found[1].rstrip('/') if found else ''


def long_description() -> str:
    """Take the README to where there are no files beside it.

    Links to files become addresses; while the repository has none, their text
    stays and images go.
    """
    address = repository()

    def replace(match: re.Match) -> str:
        mark, text, path = match.groups()
        if not address:
            return '' if mark else text
        kind = 'raw' if mark else 'blob'
        return f'{mark}[{text}]({address}/{kind}/v{get_version()}/{path})'

    text, last = read('README.md'), ''
    while text != last:  # an image may be the text of a link
        last, text = text, RELATIVE.sub(replace, text)
    return text


def get_version() -> str:
    """Read the version without importing the package, which needs mmseg."""
    scope: dict = {}
    exec(read(f'{PACKAGE}/version.py'), scope)
    return scope['__version__']


def parse_requirements(path: str) -> List[str]:
    """Read a requirements file and the files that it includes by ``-r``.

    Args:
        path (str): Path below the root of the repository.

    Returns:
        list[str]: The requirements in it.
    """
    requirements = []
    for line in read(path).splitlines():
        line = line.split('#')[0].strip()
        if line.startswith('-r '):
            requirements += parse_requirements(
                osp.join(osp.dirname(path), line[3:].strip()))
        elif line:
            requirements.append(line)
    return requirements


class BuildPyWithMim(build_py):
    """Build the package and give it its ``.mim`` folder.

    A wheel gets copies and an editable install gets links, so that an edited
    config is the one that is used. setuptools itself says which of the two
    it builds; guessing it from ``sys.argv``, as is common, does not work
    with a pip that calls the build backend.
    """

    def run(self) -> None:
        """Build, then add ``.mim``."""
        super().run()
        editable = getattr(self, 'editable_mode', False)
        base = ROOT if editable else self.build_lib
        mim = osp.join(base, PACKAGE, '.mim')
        os.makedirs(mim, exist_ok=True)
        for name in MIM_FILES:
            source, target = osp.join(ROOT, name), osp.join(mim, name)
            remove(target)
            if editable:
                try:
                    os.symlink(osp.relpath(source, mim), target)
                    continue
                except OSError as error:  # Windows without the privilege
                    warnings.warn(f'{target} cannot be a link ({error}): '
                                  'install again after editing configs')
            copy(source, target)


def remove(path: str) -> None:
    """Remove a file, a link (not what it points at) or a folder."""
    if osp.isdir(path) and not osp.islink(path):
        shutil.rmtree(path)
    elif osp.lexists(path):
        os.remove(path)


def copy(source: str, target: str) -> None:
    """Copy a file or a folder without what is of no use elsewhere."""
    if osp.isdir(source):
        shutil.copytree(
            source,
            target,
            ignore=shutil.ignore_patterns('__pycache__', '*.pyc',
                                          *CHECKOUT_ONLY))
    else:
        shutil.copyfile(source, target)


if __name__ == '__main__':
    setup(
        name=PACKAGE,
        version=get_version(),
        description='CLIP text knowledge for real-time segmentation networks '
        'of MMSegmentation, at no cost at inference',
        long_description=long_description(),
        long_description_content_type='text/markdown',
        author='mmseg_textkd contributors',
        keywords='computer vision, semantic segmentation, CLIP, '
        'knowledge distillation, real-time',
        license_expression='Apache-2.0',
        license_files=['LICENSE'],
        project_urls=dict(Source=repository()) if repository() else {},
        classifiers=[
            'Development Status :: 4 - Beta',
            'Intended Audience :: Science/Research',
            'Operating System :: MacOS',
            'Operating System :: POSIX :: Linux',
            'Programming Language :: Python :: 3 :: Only',
            'Programming Language :: Python :: 3.10',
            'Programming Language :: Python :: 3.11',
            'Programming Language :: Python :: 3.12',
            'Programming Language :: Python :: 3.13',
            'Topic :: Scientific/Engineering :: Artificial Intelligence',
            'Topic :: Scientific/Engineering :: Image Recognition',
            'Typing :: Typed',
        ],
        python_requires='>=3.10',
        packages=find_packages(include=[PACKAGE, f'{PACKAGE}.*']),
        package_data={
            PACKAGE: ['py.typed'],
            f'{PACKAGE}.clip': ['toy_clip/*'],
            f'{PACKAGE}.text': ['vocabularies/*', 'vocabularies/synonyms/*'],
        },
        cmdclass=dict(build_py=BuildPyWithMim),
        # mmengine, mmcv and mmsegmentation are left out: they exist under
        # two names each. What is missing is said on import.
        install_requires=parse_requirements('requirements/runtime.txt'),
        extras_require={
            'all':
            parse_requirements('requirements.txt'),
            'clip': [
                line
                for line in parse_requirements('requirements/optional.txt')
                if 'clip' in line
            ],
            'docs':
            parse_requirements('requirements/docs.txt'),
            'mim':
            parse_requirements('requirements/mminstall.txt'),
            'optional':
            parse_requirements('requirements/optional.txt'),
            'tests':
            parse_requirements('requirements/tests.txt'),
        },
        zip_safe=False)
