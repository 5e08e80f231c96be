# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Every cure: the fault without it, no fault with it, inert elsewhere.

A fault is shown in a fresh process that does not import mmseg_textkd, so
that nothing of this process (which has it imported) helps it along.
"""
import importlib.metadata as metadata
import json
import os
import os.path as osp
import pickle
import subprocess
import sys
import tempfile
import textwrap
from collections import OrderedDict
from importlib.util import find_spec
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmengine.logging import HistoryBuffer
from mmseg.models import losses
from scipy.ndimage import map_coordinates

from mmseg_textkd import _mmcv_ops, compat

pytestmark = pytest.mark.stacks

ROOT = osp.dirname(osp.dirname(osp.abspath(__file__)))
STOCK = 'bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py'


def _installed(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


UPSTREAM = _installed('mmsegmentation') is not None
PLAIN_ENGINE = _installed('mmengine') == '0.10.7'
# What is known to be broken where; the tests below hold it against reality.
BROKEN = {
    'mmcv.ops': UPSTREAM and find_spec('mmcv._ext') is None,
    # Everywhere: torch allows no log history.
    'safe globals': True,
    # Everywhere: at least what is loaded from a URL.
    'code in checkpoints': True,
    'distribution name': not UPSTREAM,
    'pkg_resources': PLAIN_ENGINE and find_spec('pkg_resources') is None,
    'mmseg assertion': False,
    # Upstream always, OneDL only with `avg_non_ignore`.
    'class weights': True,
    'unnamed files': True,
    'drawing': int(cv2.__version__.split('.')[0]) >= 5,
}

# Forks what runs the code from a process that has imported torch, MMEngine and
# timm, which no cure depends on, and neither MMCV nor MMSegmentation.
SERVER = '''
import json, os, sys, traceback
import mmengine.runner
try:
    import timm
except ImportError:
    pass
for line in sys.stdin:
    code, cwd, paths, output = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for number in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), number)
        os.chdir(cwd)
        sys.path[:0] = ['', *paths]
        status = 1
        try:
            exec(code, dict(__name__='__main__'))
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''


@pytest.fixture(scope='module', autouse=True)
def _server():
    """Serve :func:`python`."""
    command = [sys.executable, '-c', SERVER]
    with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True) as python.server:
        yield
        python.server.stdin.close()


def python(code, cwd, *paths):
    """Run code in a fresh process; returns its exit code and its output."""
    with tempfile.NamedTemporaryFile('r') as output:
        job = [textwrap.dedent(code), str(cwd), [*paths, ROOT], output.name]
        print(json.dumps(job), file=python.server.stdin, flush=True)
        return int(python.server.stdout.readline()), output.read()


def holds_against(cure, code, cwd, symptom):
    """Run code without the package, and see what should be."""
    status, output = python(code, cwd)
    if BROKEN[cure]:
        assert status != 0 and symptom in output
    else:
        assert status == 0, output
    return output


CURE = 'import mmseg_textkd.compat as c\nprint("cures", c.apply())\n'
MODELS = 'import mmseg.models, mmseg.apis\n'
SCOPES = '''
from mmengine.config import Config
from mmengine.utils import get_installed_path, is_installed
for file in ('a.py', 'b.py'):
    cfg = Config.fromfile(file)
    print(cfg.model.backbone.type, cfg.model._scope_)
assert is_installed('numpy') and not is_installed('no-such-thing')
assert get_installed_path('mmengine').endswith('mmengine')
assert is_installed('opencv-python-headless') or is_installed('opencv-python')
'''
WEIGHTS = '''
import torch
from mmseg.models.losses import CrossEntropyLoss, cross_entropy
label = torch.tensor([[[0, 255]]])
for avg_non_ignore in (False, True):
    loss = CrossEntropyLoss(
        class_weight=[1., 3.], avg_non_ignore=avg_non_ignore)
    assert loss.cls_criterion is cross_entropy
    value = loss(torch.zeros(1, 2, 1, 2), label, ignore_index=255)
    print('value', round(value.item(), 4))
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A config that the model index knows and one that it does not."""
    folder = tmp_path_factory.mktemp('scopes')
    (folder / 'a.py').write_text(f"_base_ = 'mmseg::{STOCK}'")
    (folder /
     'b.py').write_text("_base_ = 'mmseg::_base_/models/bisenetv2.py'")
    return folder


@pytest.fixture(scope='module')
def cured(folder):
    """All of these with the package: what it cures, and what they print."""
    status, output = python(CURE + MODELS + SCOPES + WEIGHTS, folder)
    assert status == 0, output
    return output.split('cures', 1)[1]


def test_exactly_what_is_broken_is_cured_and_only_once():
    expected = [name for name, broken in BROKEN.items() if broken]
    assert sorted(compat.apply()) == sorted(expected)
    assert compat.apply() == compat.apply()
    assert expected, 'no stack is known that needs nothing'


def test_models_import_without_compiled_ops(tmp_path, cured):
    holds_against('mmcv.ops', MODELS, tmp_path, "No module named 'mmcv._ext'")
    for cure in ('mmcv.ops', 'pkg_resources', 'distribution name',
                 'class weights'):
        assert (repr(cure) in cured.split('\n')[0]) == BROKEN[cure], cured


def test_stand_in_answers_as_the_guards_expect():
    assert (sys.modules.get('mmcv.ops') is _mmcv_ops) == BROKEN['mmcv.ops']
    with pytest.raises(ModuleNotFoundError, match='full mmcv'):
        _mmcv_ops.DeformConv2d
    with pytest.raises(AttributeError):
        _mmcv_ops.__path__
    assert not hasattr(_mmcv_ops, '__wrapped__')


def test_a_full_mmcv_keeps_its_own_ops(tmp_path):
    (tmp_path / 'ops').mkdir()
    (tmp_path / 'version.py').write_text("__version__ = '2.1.0'")
    (tmp_path / '_ext.py').write_text('')
    (tmp_path / 'ops' / '__init__.py').write_text(
        textwrap.dedent('''
        def point_sample(): "compiled"
        def sigmoid_focal_loss(): "compiled"
        def __getattr__(name):
            if name.startswith('__'):
                raise AttributeError(name)
            return type(name, (), {})
        '''))
    status, output = python(
        f'''
        import mmcv
        mmcv.__path__.insert(0, {str(tmp_path)!r})
        import mmseg_textkd.compat as compat
        assert 'mmcv.ops' not in compat.apply()
        import mmcv.ops
        import mmseg.models.losses.focal_loss as focal
        assert mmcv.ops.__file__.startswith({str(tmp_path)!r}), mmcv.ops
        assert focal._sigmoid_focal_loss.__doc__ == 'compiled'
        print('kept')
        ''', tmp_path)
    assert status == 0 and 'kept' in output, output


@each_case('align_corners', [False, True])
def test_point_sample_interpolates(align_corners):
    feature = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    points = torch.rand(2, 10, 2, dtype=torch.float64)
    shape = torch.tensor([7., 5.]).double()
    place = points * (shape - 1) if align_corners else points * shape - .5
    expected = torch.tensor(
        np.stack([[
            map_coordinates(
                plane, xy.T.flip(0), order=1, mode='grid-constant')
            for plane in planes
        ] for planes, xy in zip(feature, place)]))
    out = _mmcv_ops.point_sample(feature, points, align_corners)
    torch.testing.assert_close(out, expected)
    grid = points.reshape(2, 2, 5, 2)
    torch.testing.assert_close(
        _mmcv_ops.point_sample(feature, grid, align_corners),
        expected.reshape(2, 3, 2, 5))


@each_case('gamma, alpha', [(2.0, 0.25), (0.0, 0.5), (3., 0.9)])
def test_sigmoid_focal_loss_equals_its_definition(gamma, alpha):
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, 1, 4, 2, 2])  # 4: no class
    weight = torch.tensor([1., 2., .5, 3.], dtype=torch.float64)
    p = 1 / (1 + (-logits).exp())
    expected = torch.where(target[:, None] == torch.arange(4),
                           -alpha * (1 - p)**gamma * p.log(),
                           -(1 - alpha) * p**gamma * (1 - p).log())
    loss = _mmcv_ops.sigmoid_focal_loss
    args = (logits, target, gamma, alpha)
    torch.testing.assert_close(loss(*args, None, 'none'), expected)
    torch.testing.assert_close(loss(*args), expected.sum() / 6)
    torch.testing.assert_close(loss(*args, None, 'sum'), expected.sum())
    factor = torch.tensor([1., 3., 2., 1., .5, .5], dtype=torch.float64)
    torch.testing.assert_close(
        loss(*args, weight, 'none'), expected * factor[:, None])
    assert torch.autograd.gradcheck(lambda x: loss(x, target, gamma, alpha),
                                    logits)


def test_sigmoid_focal_loss_is_finite_far_out_and_refuses_nonsense():
    logits = torch.tensor([[200., -200.]], requires_grad=True)
    loss = _mmcv_ops.sigmoid_focal_loss(logits, torch.tensor([1]))
    loss.backward()
    # Both wrong by 200: (0.75 * 200 + 0.25 * 200) / 1 row.
    assert loss.item() == pytest.approx(200)
    assert logits.grad.isfinite().all()
    with pytest.raises(ValueError, match="got 'avg'"):
        _mmcv_ops.sigmoid_focal_loss(
            logits, torch.tensor([1]), reduction='avg')


TRAIN = '''
import numpy as np
import torch
from torch.utils.data import DataLoader
from mmengine.model import BaseModel
from mmengine.runner import Runner
class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.linear(torch.stack(inputs)).square().mean())
runner = Runner(
    model=Toy(), work_dir='run', experiment_name='toy', log_level='WARNING',
    train_dataloader=dict(
        batch_size=2, dataset=list(torch.ones(4, 2)),
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=lambda batch: dict(inputs=batch)),
    optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
    train_cfg=dict(by_epoch=False, max_iters={iters}),
    default_hooks=dict(
        logger=dict(type='LoggerHook', interval=1),
        checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1)),
    resume={resume})
# As after a validation with `save_best`.
runner.message_hub.update_info('best_score', np.float32(0.5))
runner.train()
history = runner.message_hub.log_scalars['train/loss']
print('iterations', runner.iter, 'losses', history.data[0].shape[0])
'''


def test_resume_from_a_runner_checkpoint(tmp_path):
    status, output = python(TRAIN.format(iters=3, resume=False), tmp_path)
    assert status == 0 and 'iterations 3 losses 3' in output, output
    # MMEngine 0.10.7 resumes by this; OneDL's falls back to loading anything.
    code = ("import mmengine, torch\n"
            "torch.load('run/iter_3.pth', weights_only=True)")
    holds_against('safe globals', code, tmp_path, 'Weights only load failed')
    status, output = python(
        'import mmseg_textkd.compat as c\nc.apply()\n'
        'import numpy as np, torch, pickle\n' +
        TRAIN.format(iters=5, resume=True), tmp_path)
    assert status == 0 and 'iterations 5 losses 5' in output, output
    assert 'Falling back to weights_only' not in output
    if np.lib.NumpyVersion(np.__version__) >= '2.0.0':
        # As numpy 1 wrote it: the module had another name.
        # OneDL's loader, which other tests use, takes back what it allows.
        compat.allow_runner_checkpoints()
        saved = torch.load(tmp_path / 'run/iter_3.pth', weights_only=True)
        old = tmp_path / 'old.pth'
        torch.save(saved, old, _use_new_zipfile_serialization=False)
        data = old.read_bytes()
        assert b'numpy._core.multiarray\n' in data
        old.write_bytes(
            data.replace(b'numpy._core.multiarray\n',
                         b'numpy.core.multiarray\n'))
        again = torch.load(old, weights_only=True)
        for key, buffer in saved['message_hub']['log_scalars'].items():
            assert (again['message_hub']['log_scalars'][key].data[0] ==
                    buffer.data[0]).all()


def test_numpy_1_has_an_empty_module_of_numpy_2s_name(monkeypatch):
    monkeypatch.setattr(np, '_core', ModuleType('numpy._core'), raising=False)
    names = {
        f'{x.__module__}.{x.__name__}'
        for x in compat._runner_globals.__wrapped__()
    }
    assert {
        f'numpy.{core}.multiarray.{name}'
        for core in ('core', '_core')
        for name in ('_reconstruct', 'scalar')
    } <= names


def test_what_is_allowed_to_load_is_no_more_than_that(tmp_path):

    class Sly:

        def __reduce__(self):
            return getattr, (OrderedDict, 'clear')

    torch.save(dict(x=Sly()), tmp_path / 'sly.pth')
    compat.allow_runner_checkpoints()
    with pytest.raises(pickle.UnpicklingError, match="'clear' is not allowed"):
        torch.load(tmp_path / 'sly.pth', weights_only=True)
    for owner, name in ((os, 'system'), (HistoryBuffer, '__init__')):
        with pytest.raises(pickle.UnpicklingError, match='is not allowed'):
            compat._history_method(owner, name)


def test_scope_inheritance(folder, cured):
    cure, symptom = (('pkg_resources',
                      "No module named 'pkg_resources'") if UPSTREAM else
                     ('distribution name', 'mmsegmentation is not installed'))
    holds_against(cure, SCOPES, folder, symptom)
    assert cured.count('BiSeNetV2 mmseg') == 2


def test_expression_base_needs_no_import_before(tmp_path):
    """Nor what only text encoders need."""
    (tmp_path / 'b.py').write_text(
        "_base_ = __import__('mmseg_textkd').stock_config("
        "'_base_/models/bisenetv2.py')")
    status, output = python(
        '''
        import sys
        sys.modules['open_clip'] = sys.modules['huggingface_hub'] = None
        from mmengine.config import Config
        from mmengine.registry import init_default_scope
        cfg = Config.fromfile('b.py')
        init_default_scope('mmseg')
        from mmseg.registry import MODELS
        cfg.model.train_cfg = cfg.model.test_cfg = None
        print(type(MODELS.build(cfg.model.backbone)).__name__, 'built')
        ''', tmp_path)
    assert status == 0 and 'BiSeNetV2 built' in output, output


def test_class_weights_with_ignored_pixels(tmp_path, cured):
    start = f'''
import sys
sys.path.insert(0, {osp.join(ROOT, 'mmseg_textkd')!r})
if {BROKEN['mmcv.ops']}:  # the fault of another cure
    import _mmcv_ops
    sys.modules['mmcv.ops'] = _mmcv_ops
sys.path.pop(0)
'''
    holds_against('class weights', start + WEIGHTS, tmp_path, 'IndexError')
    assert cured.count('value 0.6931') == 2


def naive_cross_entropy(scores, labels, class_weight, avg_non_ignore):
    """As the fork means it; without weights ignored pixels may count."""
    valid = labels != 255
    known = labels.where(valid, 0)
    rows = -scores.log_softmax(1).gather(1, known[:, None])[:, 0]
    weight = valid.double()
    norm = weight.sum() if avg_non_ignore else labels.numel()
    if class_weight is not None:
        weight = weight * class_weight[known]
        norm = weight.sum()
    return (weight * rows).sum() / norm


@each_case('avg_non_ignore', [False, True])
@each_case('weighted', [False, True])
@each_case('ignored', [0, 5])
def test_weighted_cross_entropy_equals_its_definition(avg_non_ignore, weighted,
                                                      ignored):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=generator)
    scores.requires_grad_()
    labels = torch.randint(0, 4, (2, 3, 5), generator=generator)
    labels.view(-1)[torch.randperm(30, generator=generator)[:ignored]] = 255
    weight = torch.tensor([.5, 1., 2., 4.]).double() if weighted else None
    options = dict(
        class_weight=weight, ignore_index=255, avg_non_ignore=avg_non_ignore)
    loss = losses.cross_entropy(scores, labels, **options)
    # Its divisor has float32's epsilon added.
    close = dict(rtol=1e-6, atol=0)
    torch.testing.assert_close(
        loss, naive_cross_entropy(scores, labels, weight, avg_non_ignore),
        **close)
    gradient, = torch.autograd.grad(loss, scores)
    assert gradient.isfinite().all()
    seen = (gradient != 0).any(dim=1)
    assert torch.equal(seen, labels != 255)
    own = F.cross_entropy(scores, labels, weight, ignore_index=255)
    if weighted or avg_non_ignore or not ignored:
        torch.testing.assert_close(loss, own, **close)
    try:
        stock = losses.cross_entropy.__wrapped__(scores, labels, **options)
    except IndexError:
        assert weighted and (avg_non_ignore or UPSTREAM and ignored)
    else:
        torch.testing.assert_close(loss, stock, rtol=1e-12, atol=0)


def test_weighted_cross_entropy_with_other_reductions():
    scores = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    labels = torch.tensor([[[0, 1, 2, 255], [255, 2, 1, 0]]])
    weight = torch.tensor([1., 2., 3.]).double()
    options = dict(class_weight=weight, ignore_index=255)
    pixels = F.cross_entropy(
        scores, labels, weight, reduction='none', ignore_index=255)
    for reduction, expected in (('none', pixels), ('sum', pixels.sum())):
        torch.testing.assert_close(
            losses.cross_entropy(
                scores, labels, reduction=reduction, **options), expected)
    torch.testing.assert_close(
        losses.cross_entropy(scores, labels, avg_factor=7., **options),
        pixels.sum() / 7,
        rtol=1e-6,
        atol=0)
    factor = torch.rand(1, 2, 4)
    torch.testing.assert_close(
        losses.cross_entropy(scores, labels, factor, **options),
        (pixels * factor).sum() / 12,
        rtol=1e-6,
        atol=0)
    # Nothing but ignored pixels: no loss, not NaN.
    nothing = torch.full_like(labels, 255)
    assert losses.cross_entropy(scores, nothing, **options) == 0


def test_a_sound_cross_entropy_is_left_alone():
    sound = losses.cross_entropy
    assert compat._weigh_with_ignored_pixels() is False
    assert losses.cross_entropy is sound
    assert losses.cross_entropy_loss.cross_entropy is sound


def test_stock_files():
    path = compat.stock_config(STOCK)
    assert osp.isabs(path) and osp.isfile(path)
    with pytest.raises(FileNotFoundError, match='_base_/models/bisenetv2.py'):
        compat.stock_config('_base_/models/bisenet2.py')
    tool = compat.load_stock_tool('train.py')
    assert callable(tool.main) and callable(tool.parse_args)
    with pytest.raises(FileNotFoundError, match='Near: train.py'):
        compat.load_stock_tool('trian.py')


def test_newer_mmcv_is_not_refused(tmp_path):
    start = "import mmcv\nmmcv.__version__ = '2.9.0'\n"
    status, output = python(start + 'import mmseg', tmp_path)
    refuses = 'MMCV==2.9.0 is used but incompatible' in output
    assert (status != 0) == refuses == (
        _installed('mmsegmentation') == '1.2.2')
    status, output = python(
        start + 'import mmseg_textkd.compat as c, mmseg.models\n'
        "print('cured', 'mmseg assertion' in c.apply(), mmcv.__version__)",
        tmp_path)
    assert status == 0 and f'cured {refuses} 2.9.0' in output, output


@each_case('absent', ['mmengine', 'mmcv', 'mmseg', 'torch'])
def test_missing_library_is_one_line_that_says_what_to_install(
        tmp_path, absent):
    status, output = python(
        f'import sys\nsys.modules[{absent!r}] = None\nimport mmseg_textkd',
        tmp_path)
    assert status != 0
    line = output.strip().split('\n')[-1]
    assert line.startswith(f'ImportError: mmseg_textkd needs {absent}, not')
    assert 'mmsegmentation' in line and 'onedl-mmsegmentation' in line
    assert ('pip install torch' in line) == (absent == 'torch')


@each_case('name', ['mmseg/__init__.py', 'mmseg.py'])
def test_the_word_segmenter_is_recognized(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('def seg_txt(text): return text.split()')
    status, output = python('import mmseg_textkd', tmp_path, str(tmp_path))
    assert status != 0
    line = output.strip().split('\n')[-1]
    assert str(tmp_path) in line and '`pip uninstall mmseg`' in line


def test_old_is_refused_and_new_is_only_warned_of(tmp_path, monkeypatch):
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv' / '__init__.py').write_text('')
    (tmp_path / 'mmcv' / 'version.py').write_text("__version__ = '1.7.1'")
    status, output = python('import mmseg_textkd', tmp_path, str(tmp_path))
    assert status != 0 and 'needs mmcv >= 2.0.0, but 1.7.1' in output
    monkeypatch.setitem(compat.VERSIONS, 'mmseg', ('0.1', '0.2'))
    with pytest.warns(UserWarning, match=r'mmseg 1\.\S+ \(tested up to 0.2'):
        compat.check_versions()
