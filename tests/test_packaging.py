# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What a wheel, a source distribution and an editable install contain."""
import json
import os
import os.path as osp
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_string
from glob import glob
from importlib import metadata
from pathlib import Path

import mmengine
import pytest
from each_case import each_case

from mmseg_textkd.datasets.toy_scenes_generator import generate_toy_scenes
from mmseg_textkd.deploy import to_stock_cfg

ROOT = osp.dirname(osp.dirname(osp.abspath(__file__)))
DATA = ('text/vocabularies', 'clip/toy_clip')
CHECKOUT_ONLY = {
    'build_docs.sh', 'lint.sh', 'model_index.py', 'networks.md.in',
    'networks.py', 'parity', 'quickstart.py', 'quickstart.sh', 'run_tests.sh',
    'runtimes.py', 'scheduled_newest.sh', 'setup_env.sh', 'study_slice.sh',
    'test_page.sh', 'test_runtimes.sh', 'toy_clip'
}


def run(*command, cwd, **env):
    options = dict(env=dict(os.environ, **env), capture_output=True, text=True)
    done = subprocess.run(command, cwd=cwd, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*args, cwd):
    command = sys.executable, '-m', 'pip', '--disable-pip-version-check'
    return run(*command, *args, cwd=cwd)


def lines_of(path):
    return Path(path).read_text().splitlines()


def names_in(lines):
    """Names of distributions at the beginning of lines, in lower case."""
    found = (re.match(r'\w[\w.-]*', line) for line in lines)
    return {match[0].lower().replace('_', '-') for match in found if match}


def below(folder):
    """All files below a folder, relative to it."""
    found = {
        osp.relpath(osp.join(base, file), folder)
        for base, folders, files in os.walk(folder)
        for file in files if '__pycache__' not in base
    }
    assert found, f'{folder} is empty'
    return found


def test_an_environment_is_known_through_a_link(tmp_path):
    """It would be removed and made anew; also with an odd CDPATH."""
    real, script = tmp_path / 'real', Path(ROOT, 'tools/setup_env.sh')
    for file in ('tools', 'requirements', 'mmseg_textkd', '.venv/bin'):
        (real / file).mkdir(parents=True)
    for file in ('requirements.txt', 'setup.py', 'pyproject.toml',
                 'mmseg_textkd/version.py', 'tools/setup_env.sh',
                 'requirements/tests.txt'):
        shutil.copy(Path(ROOT, file), real / file)
    (real / '.venv/bin/activate').touch()
    (real / '.venv/bin/python').symlink_to(sys.executable)
    (real / '.venv/.mmseg_textkd-made-here').write_text(f'{real}\n')
    functions = script.read_text().removesuffix('\nsetup_env\n')
    stamp = f'root={real} stack=upstream float=0 venv={real}/.venv'
    stamp += f'\n{functions}\nsetup_env_hash > .venv/.mmseg_textkd-stamp'
    run('bash', '-c', stamp, cwd=real)
    link = tmp_path / 'link'
    link.symlink_to(real)
    said = f'setup_env: {real}/.venv is complete (stack upstream)\n'
    for name in ('real', 'link'):
        path = f'{name}/tools/setup_env.sh'
        env = dict(STACK='upstream', FLOAT='0', CDPATH='.')
        assert run('bash', path, cwd=tmp_path, PYTHON='false', **env) == said


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of the repository, so that building leaves nothing in it."""
    target = str(tmp_path_factory.mktemp('source') / 'mmseg_textkd')
    os.mkdir(target)
    for name in ('mmseg_textkd', 'configs', 'tools', 'requirements'):
        path, copy = osp.join(ROOT, name), osp.join(target, name)
        shutil.copytree(path, copy, ignore=shutil.ignore_patterns('.mim'))
    for path in glob(f'{ROOT}/*'):
        if osp.isfile(path):
            shutil.copy(path, target)
    return target


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory):
    """A wheel, built by way of a source distribution."""
    folder = tmp_path_factory.mktemp('dist')
    code = 'from setuptools.build_meta import build_sdist; '
    code += f'build_sdist({str(folder)!r})'
    run(sys.executable, '-c', code, cwd=source)
    archive, = folder.glob('*.tar.gz')
    # tarfile has no filters before Python 3.11.4 and 3.10.12.
    run('tar', '-xf', str(archive), cwd=folder)
    # Half of the tests, without what they import, would be of no use.
    assert not list(folder.glob('*/tests'))
    unpacked, = [path for path in folder.iterdir() if path.is_dir()]
    words = 'wheel', '--no-deps', '--no-build-isolation', '-w', str(folder)
    pip(*words, str(unpacked), cwd=folder)
    built, = folder.glob('*.whl')
    return str(built)


def test_wheel_holds_mim_files_and_data(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if not name.endswith('/')}
        sizes = {info.filename: info.file_size for info in file.infolist()}
        tools = {n: file.read(n) for n in names if '/.mim/tools/' in n}
    # They write pages or environments of a checkout.
    of_checkout = re.compile(b"setup_env|/ 'docs'")
    assert not [n for n, text in tools.items() if of_checkout.search(text)]
    for folder in ('configs', 'tools'):
        for path in below(osp.join(ROOT, folder)):
            here = f'mmseg_textkd/.mim/{folder}/{path}' in names
            assert here != bool(CHECKOUT_ONLY & {*path.split('/')}), path
    # What says that it needs a checkout, as tests and networks do, is none.
    assert not [n for n in names if re.search('tests?/|setup_env', n)]
    assert 'mmseg_textkd/py.typed' in names
    assert 'mmseg_textkd/.mim/model-index.yml' in names
    for folder in DATA:
        for path in below(osp.join(ROOT, 'mmseg_textkd', folder)):
            name = f'mmseg_textkd/{folder}/{path}'
            assert sizes[name] == osp.getsize(osp.join(ROOT, name))
    info = osp.basename(wheel).split('-py3')[0] + '.dist-info'
    assert {name.split('/')[0] for name in names} == {'mmseg_textkd', info}
    assert not [name for name in names if '__pycache__' in name]


def test_wheel_needs_no_library_of_two_names(wheel):
    with zipfile.ZipFile(wheel) as file:
        name, = [n for n in file.namelist() if n.endswith('/METADATA')]
        meta = message_from_string(file.read(name).decode())
    assert meta['License-Expression'] == 'Apache-2.0'
    independent = 'Operating System :: OS Independent'
    assert independent not in meta.get_all('Classifier')
    # Beside a page of the index there are no files.
    links = re.findall(r'\]\(([^)]*)\)', meta.get_payload())
    assert links and all(link.startswith(('http', '#')) for link in links)
    needs = meta.get_all('Requires-Dist')
    plain = names_in(need for need in needs if 'extra ==' not in need)
    assert {'ftfy', 'regex', 'safetensors', 'filelock'} <= plain
    assert not [need for need in plain if re.match('mm|onedl', need)]
    clip = [need for need in needs if re.search('extra == .clip', need)]
    assert len(clip) == 1 and clip[0].startswith('open_clip_torch')


@pytest.fixture(scope='module')
def site(wheel, tmp_path_factory):
    """A folder with the wheel installed."""
    folder = tmp_path_factory.mktemp('site')
    pip('install', '--no-deps', '--target', str(folder), wheel, cwd=folder)
    return str(folder)


def has_mim():
    """Whether OpenMMLab's mim is installed; OneDL's finds no wheel of ours."""
    try:
        return bool(metadata.version('openmim'))
    except metadata.PackageNotFoundError:
        return False


def test_wheel_trains_and_tests(site, tmp_path):
    """With `mim`, or by the command that `mim` puts together.

    First by a config that inherits one of the wheel, then by its name.
    """
    generate_toy_scenes(
        tmp_path / 'data/toy_scenes', 2, 2, height=64, width=128)
    name = 'textkd_bisenetv2_fcn_toyclip_1xb8-200i_toy-scenes-128x256.py'
    inside = f'{site}/mmseg_textkd/.mim'
    (tmp_path / 'own.py').write_text(
        f"_base_ = 'mmseg_textkd::text_classifier/{name}'\n"
        "imported_from = __import__('mmseg_textkd').__file__\n")

    def call(command, name, *args, **checkpoint):
        words = [sys.executable, '-m', 'mim', command, 'mmseg_textkd', name]
        words += [f'--{k}={v}' for k, v in checkpoint.items()] + ['--gpus=0']
        if not has_mim():
            tool = f'{inside}/tools/{command}.py'
            config = osp.join(f'{inside}/configs/text_classifier', name)
            words = [sys.executable, tool, config, *checkpoint.values()]
            words += ['--launcher', 'none']
        for split in ('train', 'val', 'test'):
            args += (f'{split}_dataloader.num_workers=0',
                     f'{split}_dataloader.persistent_workers=False',
                     f'{split}_dataloader.batch_size=2')
        words += ['--work-dir=work', '--cfg-options', *args]
        env = dict(PYTHONPATH=site, CUDA_VISIBLE_DEVICES='')
        return run(*words, cwd=tmp_path, **env)

    call('train', str(tmp_path / 'own.py'), 'train_cfg.max_iters=2',
         'train_cfg.val_interval=2', 'custom_hooks.0.switch_at=1',
         'default_hooks.checkpoint.interval=2')
    cfg = mmengine.Config.fromfile(tmp_path / 'work/own.py')
    assert cfg.imported_from == f'{site}/mmseg_textkd/__init__.py'
    assert cfg.model._scope_ == 'mmseg_textkd'
    same = mmengine.Config.fromfile(f'{ROOT}/configs/text_classifier/{name}')
    assert to_stock_cfg(cfg).model == to_stock_cfg(same).model
    # Vectors were made, and the two scores are of the same weights.
    assert (tmp_path / 'data/text_embeddings').is_dir()
    call('test', name, checkpoint=str(tmp_path / 'work/iter_2.pth'))
    trained, = tmp_path.glob('work/*/vis_data/scalars.json')
    tested, = tmp_path.glob('work/*/*.json')
    validated = json.loads(trained.read_text().splitlines()[-1])
    found = json.loads(tested.read_text())
    assert 0 < found['mIoU'] == validated['mIoU']


def test_editable_install_links_to_the_checkout(source, tmp_path):
    venv.create(tmp_path / 'venv', with_pip=False)
    python = str(tmp_path / 'venv' / 'bin' / 'python')
    # setuptools (to build) and the rest come from this environment.
    site, = glob(str(tmp_path / 'venv/lib/python*/site-packages'))
    with open(osp.join(site, 'zz_parent.pth'), 'w') as file:
        file.write(sysconfig.get_path('purelib'))
    args = ['--no-deps', '--ignore-installed', '--no-build-isolation']
    for _ in range(2):  # must find the links of the first, not mind
        pip('--python', python, 'install', *args, '-e', source, cwd=tmp_path)
    code = ('from importlib.util import find_spec\n'
            "print(find_spec('mmseg_textkd').submodule_search_locations[0])")
    # Without PYTHONPATH.
    out = run(python, '-I', '-c', code, cwd=tmp_path).strip()
    assert osp.samefile(out, osp.join(source, 'mmseg_textkd'))
    for name in ('configs', 'tools', 'model-index.yml'):
        link = osp.join(out, '.mim', name)
        assert osp.islink(link) and not osp.isabs(os.readlink(link))
        assert osp.samefile(link, osp.join(source, name))


def test_no_requirement_is_called_mmseg():
    files = glob(f'{ROOT}/requirements/*.txt') + [f'{ROOT}/requirements.txt']
    assert len(files) >= 8
    names = set().union(*(names_in(lines_of(path)) for path in files))
    assert 'mmseg' not in names and 'mmsegmentation' in names


@each_case('stack', ['upstream', 'onedl'])
def test_constraints_pin_everything_that_is_required(stack):
    pattern = re.compile(
        r'([\w.-]+)==[\w.+]+(; python_version [<>=]+ "3.11")?')
    lines = lines_of(f'{ROOT}/requirements/constraints-{stack}.txt')
    lines = [line for line in lines if not line.startswith('#')]
    assert not [line for line in lines if not pattern.fullmatch(line)]
    pinned = names_in(lines)
    suffix = '' if stack == 'upstream' else '-onedl'
    files = 'runtime', 'optional', 'tests', f'mminstall{suffix}'
    required = set().union(
        *(names_in(lines_of(f'{ROOT}/requirements/{file}.txt'))
          for file in files))
    assert required <= pinned, required - pinned
    # torch of the machine decides on these, and a desktop is not assumed.
    assert not [name for name in pinned if re.match('nvidia|cuda|trit', name)]
