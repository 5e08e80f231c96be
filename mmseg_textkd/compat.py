# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Compatibility with versions and forks of the OpenMMLab stack.

:func:`apply` runs on ``import mmseg_textkd``. Every patch tests for the fault
itself (not for a version number) and is skipped where there is none.
"""
import codecs
import difflib
import errno
import functools
import importlib
import importlib.metadata as metadata
import os
import os.path as osp
import re
import sys
import threading
import warnings
import zipfile
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from logging import FileHandler, LogRecord, StreamHandler
from pickle import UnpicklingError
from types import ModuleType
from typing import Any, Callable, Dict, Iterator, List, Tuple, Union

# The oldest that can work and the newest that the tests have seen.
VERSIONS: Dict[str, Tuple[str, str]] = {
    'mmengine': ('0.10.4', '0.10.12'),
    'mmcv': ('2.0.0', '2.3.6'),
    'mmseg': ('1.2.0', '1.4.2'),
}
INSTALL = (
    'install either `pip install "mmengine>=0.10.7" "mmcv-lite<2.2" '
    '"mmsegmentation>=1.2.2" ftfy regex` or `pip install onedl-mmengine '
    'onedl-mmcv onedl-mmsegmentation`')

# Variables of the environment that torch reads on every load.
FORCE = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
FORBID = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
_ENVIRONMENT = threading.RLock()


@functools.lru_cache(maxsize=None)
def apply() -> Tuple[str, ...]:
    """Check the installed versions and apply all patches, once per process.

    Returns:
        tuple[str, ...]: Names of the patches that were needed, out of
        'mmseg assertion', 'mmcv.ops', 'safe globals', 'code in checkpoints',
        'distribution name', 'pkg_resources', 'class weights', 'drawing' and
        'unnamed files'.

    Raises:
        ImportError: If a library is missing or unsuitable; one line says
            what to install.
    """
    check_versions()
    _silence()
    patches: Dict[str, Callable[[], bool]] = {
        'mmseg assertion': _import_mmseg,
        'mmcv.ops': _stand_in_for_ops,
        'safe globals': allow_runner_checkpoints,
        'code in checkpoints': _load_without_code,
        'distribution name': _name_distribution,
        'pkg_resources': _find_without_pkg_resources,
        'class weights': _weigh_with_ignored_pixels,
        'drawing': _draw_all,
        'unnamed files': _name_files,
    }
    return tuple(name for name, patch in patches.items() if patch())


def check_versions() -> None:
    """Raise for missing or too old packages, warn of untested ones.

    Raises:
        ImportError: If mmengine, mmcv or mmseg is missing, too old, or is
            not MMSegmentation at all: the ``mmseg`` of PyPI is a Chinese
            word segmenter.
    """
    missing = [
        name for name in ('torch', *VERSIONS) if find_spec(name) is None
    ]
    if missing:
        hint = INSTALL
        if 'torch' in missing:
            hint = f'install `pip install torch torchvision`, then {hint}'
        raise ImportError(
            f'mmseg_textkd needs {", ".join(missing)}, not installed: {hint}')
    if not osp.isdir(osp.join(_package_dir('mmseg'), 'registry')):
        raise ImportError(
            f'The `mmseg` in {_package_dir("mmseg")} is not MMSegmentation '
            '1.x (the `mmseg` of PyPI is a word segmenter): `pip uninstall '
            f'mmseg`, then {INSTALL}')

    from packaging.version import parse
    untested = []
    for module, (oldest, newest) in VERSIONS.items():
        version = _version(module)
        if parse(version) < parse(oldest):
            raise ImportError(f'mmseg_textkd needs {module} >= {oldest}, but '
                              f'{version} is installed: {INSTALL}')
        if parse(version) > parse(newest):
            untested.append(f'{module} {version} (tested up to {newest})')
    if untested:
        warnings.warn('mmseg_textkd has not been tested with '
                      f'{", ".join(untested)}; trying all the same')


def stock_config(path: str) -> str:
    """Find a config that ships with the installed MMSegmentation.

    For ``_base_`` of a config; unlike ``'mmseg::...'`` it also works in
    MMSegmentation's own tools, whatever the distribution is called:

    ``_base_ = __import__('mmseg_textkd').stock_config('_base_/...')``

    Args:
        path (str): Path below MMSegmentation's ``configs`` folder.

    Returns:
        str: The absolute path.

    Raises:
        FileNotFoundError: If there is no such config; near matches are
            listed.
    """
    return _stock_file('configs', path)


def load_stock_tool(name: str) -> ModuleType:
    """Load a tool of the installed MMSegmentation, such as ``train.py``.

    Args:
        name (str): Path below MMSegmentation's ``tools`` folder.

    Returns:
        ModuleType: The tool as a module; its ``main`` has not been run.

    Raises:
        FileNotFoundError: If there is no such tool.
    """
    path = _stock_file('tools', name)
    spec = spec_from_file_location(
        f'mmseg_tool_{osp.splitext(osp.basename(path))[0]}', path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _stock_file(kind: str, path: str) -> str:
    """Absolute path of a file below ``configs`` or ``tools`` of MMSeg."""
    package = _package_dir('mmseg')
    # A wheel carries them in `.mim`, a source checkout beside the package.
    roots = [
        osp.join(package, '.mim', kind),
        osp.join(osp.dirname(package), kind)
    ]
    for root in roots:
        found = osp.join(root, path)
        if osp.isfile(found):
            return found
    stock = []
    for root in filter(osp.isdir, roots):
        # Imported here: the folders are only searched for an error message.
        from mmengine.utils import scandir
        stock += scandir(root, osp.splitext(path)[1] or None, recursive=True)
    near = difflib.get_close_matches(path, stock, n=3)
    raise FileNotFoundError(
        f'MMSegmentation {_version("mmseg")} has no {kind}/{path} (looked in '
        f'{" and ".join(roots)}). ' +
        (f'Near: {", ".join(near)}' if near else
         'It seems to be installed without its configs and tools; '
         'reinstall it from a wheel' if not stock else 'Nothing is near'))


def _package_dir(module: str) -> str:
    """Folder of an installed package, without importing it."""
    spec = find_spec(module)
    # A plain `mmseg.py` is no package; its own path then names the culprit.
    return list(spec.submodule_search_locations or [spec.origin])[0]


def _version(module: str) -> str:
    """Version of an installed package, without importing it."""
    spec = spec_from_file_location(
        f'_{module}_version', osp.join(_package_dir(module), 'version.py'))
    version = module_from_spec(spec)
    spec.loader.exec_module(version)
    return version.__version__


# What the libraries below say of themselves in every run: nothing that a
# user could act upon.
_WARNINGS = (
    'Fail to import ``MultiScaleDeformableAttention``',  # mmcv-lite
    '``build_loss`` would be deprecated soon',
    'Default ``avg_non_ignore`` is False',
    'The draw is False, it means that the hook for visualization',
    "Failed to add <class 'mmengine.visualization.vis_backend",  # inferencers
)
_LOGGED = ('The prefix is not set in metric class',
           '"FileClient" will be deprecated', '"HardDiskBackend" is the alias',
           'Failed to search registry with scope "mmseg" in the "function"')
# Hundreds of lines of each run, which its log file has too.
_LONG = ('Config:\n', 'Hooks will be executed in the following order:',
         f'\n{"-" * 60}\nSystem environment:')


def _silence() -> None:
    """Leave out warnings of MMSegmentation and MMEngine about themselves."""
    from mmengine.logging import MMLogger
    for message in _WARNINGS:
        warnings.filterwarnings('ignore', message=re.escape(message))

    def is_wanted(self, record: LogRecord) -> bool:
        return (not record.getMessage().startswith(_LOGGED)
                and super(MMLogger, self).filter(record))

    MMLogger.filter = is_wanted


def shorten_console() -> None:
    """Write config, environment and hooks of a run to its log file alone."""
    from mmengine.logging import MMLogger

    def call_handlers(self, record: LogRecord) -> None:
        is_long = record.getMessage().startswith(_LONG)
        for handler in self.handlers:
            if record.levelno >= handler.level and not (
                    is_long and isinstance(handler, StreamHandler)
                    and not isinstance(handler, FileHandler)):
                handler.handle(record)

    MMLogger.callHandlers = call_handlers


def _import_mmseg() -> bool:
    """Import mmseg past its assertion of mmcv < 2.2.0.

    MMSegmentation 1.2.2 refuses any newer mmcv, though it works with it.
    """
    import mmcv
    try:
        importlib.import_module('mmseg')
        return False
    except AssertionError as error:
        if 'MMCV' not in str(error):
            raise ImportError(f'{error}; {INSTALL}') from error
    shown = mmcv.__version__
    try:
        mmcv.__version__ = '2.1.0'
        importlib.import_module('mmseg')
    finally:
        mmcv.__version__ = shown
    return True


def _stand_in_for_ops() -> bool:
    """Register replacements of ``mmcv.ops`` where mmcv has no ops.

    See :mod:`mmseg_textkd._mmcv_ops`. OneDL's mmseg guards all its imports
    from ``mmcv.ops`` and therefore does not need it.
    """
    if find_spec('mmcv._ext') is not None:
        return False
    try:
        importlib.import_module('mmseg.utils')
        return False
    except ModuleNotFoundError as error:
        if error.name not in ('mmcv._ext', 'mmcv.ops'):
            raise
    import mmcv

    from . import _mmcv_ops
    sys.modules['mmcv.ops'] = mmcv.ops = _mmcv_ops
    return True


def allow_runner_checkpoints() -> bool:
    """Let ``torch.load(weights_only=True)`` read a runner's checkpoint.

    Besides tensors it holds the log history, that is a ``HistoryBuffer`` of
    numpy arrays, and with ``save_best`` a numpy scalar. MMEngine 0.10.7 does
    not know that torch 2.6 refuses them; OneDL's list lacks some, and its
    loader takes back what it allows, so once is not enough.

    Returns:
        bool: True: no version of torch allows them by itself.
    """
    import torch
    torch.serialization.add_safe_globals(_safe_globals())
    return True


def _safe_globals() -> List[Any]:
    """What a checkpoint may name, statistics of the user's own included.

    A ``HistoryBuffer`` saves all that are registered; those that this process
    has not registered itself are refused.
    """
    from mmengine.logging import HistoryBuffer
    own = [
        method for method in HistoryBuffer._statistics_methods.values()
        if not method.__qualname__.startswith('HistoryBuffer.')
    ]
    return [*_runner_globals(), *own]


@functools.lru_cache(maxsize=None)
def _runner_globals() -> List[Any]:
    """Globals of a runner's checkpoint besides tensors."""
    import numpy as np
    from mmengine.logging import HistoryBuffer
    dtypes = {type(np.dtype(code)) for code in '?bBhHiIlLqQefdg'}
    # As numpy itself pickles an array and a scalar: their module's name
    # differs, and numpy 1.26 has an empty one of numpy 2's name.
    functions = [x.__reduce__()[0] for x in (np.empty(0), np.float32())]
    return [
        HistoryBuffer,
        np.ndarray,
        np.dtype,
        bytes,  # of an empty array
        codecs.encode,  # of a number; torch 2.5 allows it by itself
        *dtypes,
        _under_name(_history_method, 'builtins.getattr'),
        # numpy 2 renamed the module: a run may be resumed across that.
        *(_under_name(function, f'numpy.{name}.multiarray.{function.__name__}')
          for function in functions for name in ('core', '_core'))
    ]


def _under_name(function: Callable, name: str) -> Callable:
    """Copy of a function under another name, for pickles."""

    def renamed(*args: Any) -> Any:
        return function(*args)

    # Before torch 2.6 a name cannot be given beside the function.
    renamed.__module__, renamed.__name__ = name.rsplit('.', 1)
    renamed.__qualname__ = renamed.__name__
    return renamed


def _history_method(owner: type, name: str) -> Callable:
    """Attributes that a runner's checkpoint needs from ``getattr``.

    A ``HistoryBuffer`` saves its methods (min, max, mean, current), which
    pickle writes as ``getattr(HistoryBuffer, 'min')``. To allow ``getattr``
    itself would open what ``weights_only`` is there to close.
    """
    from mmengine.logging import HistoryBuffer
    if owner is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
        return getattr(owner, name)
    raise UnpicklingError(f'getattr of {owner!r}, {name!r} is not allowed')


@contextmanager
def weights_only(path: Union[str, os.PathLike]) -> Iterator[None]:
    """Context in which every ``torch.load`` runs no code.

    OneDL's MMEngine falls back to ``weights_only=False``, ``torch.hub`` asks
    for it, and it is the default before torch 2.6; torch has a variable of
    the environment that overrules all of them.

    Args:
        path (str or PathLike): What is read: a file, whose checksums torch
            does not look at, or a URL.

    Yields:
        None: Once, to read it.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is damaged or holds more than weights and logs.
    """
    _ENVIRONMENT.acquire()  # all threads have the same
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORBID)}
    try:
        if os.path.isfile(path) and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken:
                raise ValueError(f'the checksum of {broken} does not fit')
        os.environ[FORCE] = '1'
        allow_runner_checkpoints()
        yield
    except Exception as error:  # a damaged pickle raises anything
        # EINVAL: torch has looked for something before the file's beginning.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(
            f'{path} is no checkpoint, a damaged one, or one that is not safe '
            f'to read: {_safe_message(error)}') from error
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        _ENVIRONMENT.release()


def _safe_message(error: Exception) -> str:
    """Get the message of an error, without torch's advice to run the code."""
    found = re.search(r'(?:GLOBAL|global) ([\w.]+\.\w+)', str(error))
    if found:
        return (f'it names {found[1]}, which is no part of weights or logs '
                'and is not run')
    lines = [
        line for line in str(error).splitlines()
        if line.strip() and 'eights' not in line
    ]
    return lines[0] if lines else type(error).__name__


def _load_without_code() -> bool:
    """Patch MMEngine's loaders to run no code from checkpoints.

    OneDL's fall back to ``weights_only=False``, all that load from a URL ask
    for it, and before torch 2.6 it is the default. A runner that resumes also
    executes ``meta['config']``, which no version of MMEngine 0.10 writes.
    """
    from mmengine.runner import checkpoint as module
    loader = module.CheckpointLoader
    stock = loader.load_checkpoint.__func__
    if hasattr(module, 'get_torch_safe_globals'):
        # OneDL's list has `getattr`.
        module.get_torch_safe_globals = _safe_globals

    @functools.wraps(stock)
    def load_checkpoint(cls, filename, *args, **kwargs):
        with weights_only(filename):
            checkpoint = stock(cls, filename, *args, **kwargs)
        if isinstance(checkpoint, dict):
            meta = checkpoint.get('meta')
            if isinstance(meta, dict):
                meta.pop('config', None)
        return checkpoint

    loader.load_checkpoint = classmethod(load_checkpoint)
    return True


def _name_distribution() -> bool:
    """Register the distribution names of ``x::`` bases in MMEngine."""
    from mmengine.config.utils import MODULE2PACKAGE
    MODULE2PACKAGE.setdefault('mmseg_textkd', 'mmseg_textkd')
    try:
        metadata.distribution(MODULE2PACKAGE['mmseg'])
        return False
    except metadata.PackageNotFoundError:
        # Without any distribution (a checkout on PYTHONPATH) MMEngine falls
        # back on the import name.
        names = metadata.packages_distributions().get('mmseg', ['mmseg'])
        MODULE2PACKAGE['mmseg'] = names[0]
        return True


def _find_without_pkg_resources() -> bool:
    """Replace MMEngine's package lookup where pkg_resources is missing.

    MMEngine 0.10.7 uses ``pkg_resources``, which setuptools 82 dropped; its
    main branch returns a wrong folder. Only these two functions of MMEngine
    are replaced; no module called ``pkg_resources`` is made up, for others
    may check whether it is installed.
    """
    from mmengine.config.utils import MODULE2PACKAGE
    from mmengine.utils import package_utils
    if 'pkg_resources' in package_utils.get_installed_path.__code__.co_names:
        broken = find_spec('pkg_resources') is None
    else:
        try:
            broken = not osp.samefile(
                package_utils.get_installed_path(MODULE2PACKAGE['mmseg']),
                _package_dir('mmseg'))
        except (ImportError, OSError):
            broken = True
    if not broken:
        return False
    for ours in (is_installed, get_installed_path):
        theirs = getattr(package_utils, ours.__name__)
        # They are imported by name, so every module has to be patched.
        for name, module in list(sys.modules.items()):
            if (name.startswith('mmengine')
                    and vars(module).get(ours.__name__) is theirs):
                setattr(module, ours.__name__, ours)
    return True


def _weigh_with_ignored_pixels() -> bool:
    """Patch cross entropy to support class weights with ignored pixels.

    MMSegmentation 1.2.2 looks up the class weight of every pixel, of ignored
    ones (255) too: an IndexError, or on a GPU a device-side assertion. OneDL
    1.4.2 leaves them out, but then fails with ``avg_non_ignore=True``.
    """
    import torch
    from mmseg.models import losses  # needs the patches before this one
    stock = losses.cross_entropy
    scores, labels = torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 255]]])
    try:
        for avg_non_ignore in (False, True):
            stock(
                scores,
                labels,
                class_weight=torch.ones(2),
                ignore_index=255,
                avg_non_ignore=avg_non_ignore)
        return False
    except IndexError:
        pass

    @functools.wraps(stock)
    def cross_entropy(pred,
                      label,
                      weight=None,
                      class_weight=None,
                      reduction='mean',
                      avg_factor=None,
                      ignore_index=-100,
                      avg_non_ignore=False):
        if (class_weight is not None and avg_factor is None
                and reduction == 'mean'):
            # OneDL's rule, and that of torch: the mean is over the weights
            # of the pixels that count, whatever `avg_non_ignore` says.
            avg_factor = class_weight[label[label != ignore_index]].sum()
        return stock(pred, label, weight, class_weight, reduction, avg_factor,
                     ignore_index, avg_non_ignore)

    # `CrossEntropyLoss` takes it from its module whenever it is built.
    module = sys.modules[losses.CrossEntropyLoss.__module__]
    losses.cross_entropy = module.cross_entropy = cross_entropy
    return True


def swaps_channels(preprocessor: Any) -> bool:
    """Whether a data preprocessor swaps red and blue.

    Args:
        preprocessor (SegDataPreProcessor): The preprocessor, whose attribute
            OneDL has renamed.

    Returns:
        bool: True if it does.
    """
    for name in ('channel_conversion', '_channel_conversion'):
        if hasattr(preprocessor, name):
            return bool(getattr(preprocessor, name))
    raise AttributeError(f'{type(preprocessor).__name__} has no '
                         'attribute for the order of channels.')


def _draw_all() -> bool:
    """Let MMSegmentation draw classes with OpenCV 5.

    Its ``cv2.rectangle`` refuses colors of NumPy's integers, which a data set
    without a palette gets, and images in another layout, which
    `browse_dataset.py` hands over.
    """
    import cv2
    import numpy as np
    from mmseg.visualization import SegLocalVisualizer
    try:
        cv2.rectangle(
            np.zeros((2, 2, 3), np.uint8), (0, 0), (1, 1), np.array([1, 2, 3]),
            -1)
        return False
    except cv2.error:
        pass
    stock = SegLocalVisualizer._draw_sem_seg

    @functools.wraps(stock)
    def draw(self, image, sem_seg, classes, palette, *args, **kwargs):
        palette = [[int(c) for c in color] for color in palette]
        return stock(self, np.ascontiguousarray(image), sem_seg, classes,
                     palette, *args, **kwargs)

    SegLocalVisualizer._draw_sem_seg = draw
    return True


def _name_files() -> bool:
    """Let errors of images and label maps that cannot be read name the file.

    MMCV decodes bytes: its errors are of ``<_io.BytesIO object>`` or of
    ``!buf.empty()``.
    """
    from mmcv.transforms import LoadImageFromFile
    from mmseg.datasets.transforms import LoadAnnotations

    def name(owner: type, method: str, key: str, what: str) -> None:
        stock = getattr(owner, method)

        @functools.wraps(stock)
        def named(self, results: Dict) -> Any:
            try:
                return stock(self, results)
            except FileNotFoundError:
                raise
            except Exception as error:  # each backend has its own
                path = results.get(key)
                if path is None or str(path) in str(error):
                    raise
                raise ValueError(
                    f'{path} cannot be read as {what}: '
                    f'{type(error).__name__}: {error}. Is it empty, cut '
                    'short or another kind of file?') from error

        setattr(owner, method, named)

    name(LoadImageFromFile, 'transform', 'img_path', 'an image')
    name(LoadAnnotations, '_load_seg_map', 'seg_map_path', 'a label map')
    return True


def is_installed(package: str) -> bool:
    """Whether a distribution or an importable package is installed.

    Args:
        package (str): Name of either.

    Returns:
        bool: True if it is there.
    """
    try:
        get_installed_path(package)
        return True
    except (metadata.PackageNotFoundError, RuntimeError):
        return False


def get_installed_path(package: str) -> str:
    """Folder of the package that a distribution installs.

    Args:
        package (str): Name of a distribution or of an importable package.

    Returns:
        str: The folder.

    Raises:
        PackageNotFoundError: If neither exists.
        RuntimeError: If it is a namespace package or no package at all.
    """
    from packaging.utils import canonicalize_name
    modules = [
        module for module, names in metadata.packages_distributions().items()
        if canonicalize_name(package) in map(canonicalize_name, names)
    ]
    # A distribution may bring several (mmsegmentation also brings `tests`).
    from mmengine.config.utils import MODULE2PACKAGE
    modules.sort(key=lambda module: module not in MODULE2PACKAGE)
    module = modules[0] if modules else package
    spec = find_spec(module) if module.isidentifier() else None
    if spec is None:
        raise metadata.PackageNotFoundError(package)
    if spec.origin is None or not spec.submodule_search_locations:
        raise RuntimeError(f'{package} has no folder of its own')
    return osp.dirname(spec.origin)
