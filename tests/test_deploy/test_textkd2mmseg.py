# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The tool that turns a trained text network into a stock one."""
import os.path as osp
import re
from pathlib import Path

import pytest
import torch
from each_case import each_case
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmseg.registry import DATASETS, MODELS
from network_tester import CONFIGS, load_config
from processes import TOOLS
from processes import load as load_checkpoint
from processes import start
from tiny import CLASSES, SIZE
from tool_modules import load_tool

from mmseg_textkd import compat
from mmseg_textkd.deploy import fold_state_dict, to_stock_cfg
from mmseg_textkd.deploy.load_stock import dataset_meta

CAMVID = (
    CONFIGS / 'text_classifier' /
    'textkd_pidnet-s_vit-b16_1xb8-10k_camvid-360x480.py')
TOOL = osp.join(TOOLS, 'model_converters', 'textkd2mmseg.py')
# Run where the plugin cannot be imported. MMSegmentation 1.2.2 imports two
# functions from mmcv.ops, which mmcv-lite has not: without the plugin it takes
# a full mmcv, or these lines.
WITHOUT_PLUGIN = '''
import sys, types

class NoPlugin:
    def find_spec(self, name, *args):
        if name.split('.')[0] == 'mmseg_textkd':
            raise ImportError('the plugin was imported')

sys.meta_path.insert(0, NoPlugin())
try:
    import mmseg_textkd
    raise AssertionError
except ImportError as error:
    assert 'the plugin was imported' in str(error)
if {lite}:
    def missing(name):
        kind = AttributeError if name[0] == '_' else ModuleNotFoundError
        raise kind(name)

    sys.modules['mmcv.ops'] = ops = types.ModuleType('mmcv.ops')
    ops.point_sample = ops.sigmoid_focal_loss = None
    ops.__getattr__ = missing

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS
import mmseg.datasets, mmseg.models

init_default_scope('mmseg')
for name in sys.argv[1:]:
    cfg = Config.fromfile(name + '.py')
    model = MODELS.build(cfg.model).eval()
    checkpoint = torch.load(name + '.pth', weights_only=True)
    model.load_state_dict(checkpoint['state_dict'], strict=True)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    with torch.no_grad():
        results = [
            model.test_step(pseudo_collate([dataset[i]]))[0].seg_logits.data
            for i in range(len(dataset))
        ]
    torch.save(results, name + '.logits')
'''


@pytest.fixture(scope='module')
def tool():
    """The tool as a module."""
    return load_tool(TOOL)


@pytest.fixture
def convert(tool, tmp_path, monkeypatch, capsys):
    """Get a function that runs the tool and gives what it printed."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)

    def go(config, checkpoint, *words, out=tmp_path / 'out.pth'):
        words = ('--device', 'cpu', '--num-images', 4, *words)
        tool.main([str(w) for w in (config, checkpoint, out, *words)])
        return capsys.readouterr().out

    return go


def load(path):
    return torch.load(path, weights_only=True)


def predictions(model, cfg):
    """What the model predicts on all images of the test set."""
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    with torch.no_grad():
        return [
            model.test_step(pseudo_collate([dataset[i]]))[0].seg_logits.data
            for i in range(len(dataset))
        ]


def test_classes_of_config_and_checkpoint_are_compared():
    dataset = dict(type='BaseSegDataset', metainfo=dict(classes=['a', 'b']))
    cfg = Config(dict(test_dataloader=dict(dataset=dataset)))
    assert dataset_meta(cfg, dict(classes=('a', 'b')))['classes'] == ('a', 'b')
    with pytest.raises(ValueError, match="1: 'c' in the checkpoint, 'b' in"):
        dataset_meta(cfg, dict(classes=('a', 'c')))
    with pytest.raises(ValueError, match="1: None in the checkpoint, 'b' in"):
        dataset_meta(cfg, dict(classes=('a', )))


@pytest.mark.stacks
@pytest.mark.filterwarnings('ignore:CamVid test has 2 images')
def test_result_needs_no_plugin(trained, convert, write_camvid, tmp_path):
    """Strict, in a process in which importing the plugin raises."""
    expected = {}
    for name, words in (('plain', ()), ('auxiliary', ['--strip-auxiliary'])):
        run = trained(name)
        out = tmp_path / f'{name}.pth'
        printed = convert(run.config, run.weights, *words, out=out)
        assert 'images: max |difference of logits|' in printed
        expected[name] = predictions(run.model, run.cfg)
    # A network of the package, on data that only the plugin knows.
    write_camvid(tmp_path / 'camvid')
    torch.manual_seed(0)
    cfg = load_config(CAMVID).copy()
    model = MODELS.build(cfg.model).eval()
    provider = model.decode_head.conv_seg.text
    provider.fill(torch.randn(provider.num_classes, provider.dim))
    torch.save(model.state_dict(), tmp_path / 'random.pth')
    cfg.test_dataloader.dataset.data_root = str(tmp_path / 'camvid')
    cfg.dump(tmp_path / 'config.py')
    convert(
        tmp_path / 'config.py',
        tmp_path / 'random.pth',
        out=tmp_path / 'camvid.pth')
    expected['camvid'] = predictions(model, cfg)

    script = tmp_path / 'script.py'
    script.write_text(
        WITHOUT_PLUGIN.replace('{lite}', str('mmcv.ops' in compat.apply())))
    done = start('python', script, *expected, cwd=str(tmp_path), fork=False)
    assert done.status == 0, done.output[-3000:]
    for name, logits in expected.items():
        got = load(tmp_path / f'{name}.logits')
        assert len(got) == len(logits) == (2 if name == 'camvid' else 6)
        for a, b in zip(got, logits):
            assert a.shape == b.shape
            assert (a - b).abs().max() < 1e-5 * b.abs().max()
            assert torch.equal(a.argmax(0), b.argmax(0))
    meta = load(tmp_path / 'camvid.pth')['meta']['dataset_meta']
    assert meta['classes'][-1] == 'bicyclist' and len(meta['palette']) == 11


def test_what_is_written(trained, convert, tmp_path):
    run = trained('ema')
    printed = convert(run.config, run.weights)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out.pth', 'out.py']
    out = load(tmp_path / 'out.pth')
    assert list(out) == ['state_dict', 'meta']
    expected = fold_state_dict(run.averaged)
    assert out['state_dict'].keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(out['state_dict'][key], value), key
    meta = out['meta']
    assert meta['dataset_meta'] == dict(
        classes=CLASSES, palette=[[i, i, i] for i in range(8)])
    assert meta['folded_from'] == 'iter_6.pth'
    assert meta['cfg'] == (tmp_path / 'out.py').read_text()
    assert meta['verified'] in printed
    assert {'mmseg_version', 'mmengine_version', 'torch_version'} <= set(meta)
    before = load_checkpoint(run.weights)['meta']
    assert meta['iter'] == 6 and meta['seed'] == 0
    for key in ('epoch', 'iter', 'seed', 'experiment_name', 'time'):
        assert meta[key] == before[key]
    assert meta['trained_with'] == dict(mmengine=before['mmengine_version'])
    assert meta['training_cfg'] == before['cfg'] != meta['cfg']
    cfg = Config.fromfile(tmp_path / 'out.py')
    assert cfg.to_dict() == to_stock_cfg(run.cfg).to_dict()
    relative = [float(v) for v in re.findall(r'relative (\S+) \(', printed)]
    assert len(relative) == 3 and all(0 < v < 1e-5 for v in relative)
    assert printed.count(' parameters, ') == 2
    assert '4 images: max' in printed


def test_folded_again_it_is_the_same(trained, convert, tmp_path):
    run = trained()
    convert(run.config, run.weights)
    first = load(tmp_path / 'out.pth')
    # From the text config, and from its own.
    for name, config in (('a', run.config), ('b', tmp_path / 'out.py')):
        again = tmp_path / f'{name}.pth'
        printed = convert(config, tmp_path / 'out.pth', out=again)
        assert 'has no text: it is folded already, or stock' in printed
        state = load(again)['state_dict']
        assert state.keys() == first['state_dict'].keys()
        assert all(
            torch.equal(v, first['state_dict'][k]) for k, v in state.items())
        own, first_cfg = (tmp_path / f for f in (f'{name}.py', 'out.py'))
        assert own.read_text() == first_cfg.read_text()
        meta, kept = load(again)['meta'], first['meta']
        for key in ('iter', 'seed', 'time', 'trained_with', 'training_cfg'):
            assert meta[key] == kept[key]
    # Stripped, then and later.
    convert(
        run.config,
        tmp_path / 'a.pth',
        '--strip-auxiliary',
        out=tmp_path / 'c.pth')
    convert(run.config, tmp_path / 'c.pth', out=tmp_path / 'd.pth')
    for name in 'cd':
        state = load(tmp_path / f'{name}.pth')['state_dict']
        gone = set(first['state_dict']) - set(state)
        assert gone and all(k.startswith('auxiliary_head.') for k in gone)
        assert not any(k.startswith('auxiliary_head.') for k in state)
        cfg = Config.fromfile(tmp_path / f'{name}.py')
        assert 'auxiliary_head' not in cfg.model


def test_half_precision_and_bare_weights(trained, convert, tmp_path):
    """A state dict alone, with fp16 values; its classes are the config's."""
    run = trained()
    state = load_checkpoint(run.weights)['state_dict']
    half = {
        f'module.{k}': v.half() if v.is_floating_point() else v
        for k, v in state.items()
    }
    torch.save(half, tmp_path / 'half.pth')
    cfg = run.cfg.copy()
    cfg.test_dataloader.dataset.data_root = str(tmp_path / 'nowhere')
    cfg.dump(tmp_path / 'config.py')
    printed = convert(tmp_path / 'config.py', tmp_path / 'half.pth')
    assert 'Only random inputs are compared, no images' in printed
    assert 'random 184x312' in printed and ' images: max' not in printed
    out = load(tmp_path / 'out.pth')
    dtypes = {v.dtype for v in out['state_dict'].values()}
    assert dtypes == {torch.float32, torch.int64}
    assert out['meta']['dataset_meta']['classes'] == CLASSES
    key = 'backbone.conv1.weight'
    assert torch.equal(out['state_dict'][key], state[key].half().float())


def test_l2_norm_asks_for_a_choice(trained, convert, tmp_path):
    run = trained('l2')
    with pytest.raises(SystemExit, match='--l2 keep.*--l2 approximate'):
        convert(run.config, run.weights)
    assert not list(tmp_path.iterdir())
    printed = convert(
        run.config, run.weights, '--l2', 'keep', out=tmp_path / 'keep.pth')
    assert 'APPROXIMATE' not in printed
    kept = Config.fromfile(tmp_path / 'keep.py')
    assert kept.custom_imports.imports == ['mmseg_textkd.deploy']
    model = MODELS.build(kept.model).eval()
    model.load_state_dict(load(tmp_path / 'keep.pth')['state_dict'])
    for a, b in zip(predictions(model, kept), predictions(run.model, run.cfg)):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
    words = ('--l2', 'approximate', '--num-images', '3')
    near = tmp_path / 'near.pth'
    printed = convert(run.config, run.weights, *words, out=near)
    assert 'THE FOLD IS APPROXIMATE' in printed and '3 images: max' in printed
    relative = [float(v) for v in re.findall(r'relative (\S+) \(', printed)]
    assert min(relative) > 1e-4
    cfg = Config.fromfile(tmp_path / 'near.py')
    assert cfg.model.decode_head.type == 'FCNHead'
    assert 'custom_imports' not in cfg


def damaged(run, how, path):
    """Write a checkpoint that must be refused."""
    checkpoint = load_checkpoint(run.weights)
    state = checkpoint['state_dict']
    key = 'decode_head.conv_seg.projection.conv.weight'
    if how == 'NaN':
        state[key][0, 0] = float('nan')
    elif how == 'other network':
        state = checkpoint['state_dict'] = {
            f'neck.{k}' if 'backbone' in k else k: v
            for k, v in state.items()
        }
    elif how == 'other width':
        state[key] = torch.zeros(12, 16, 1, 1)
    elif how == 'code':
        checkpoint['meta']['note'] = Path('run me')
    elif how == 'empty':
        checkpoint = dict(meta={})
    torch.save(checkpoint, path)
    data = bytearray(path.read_bytes())
    if how == 'one bit':
        # In the middle of a tensor.
        place = data.find(state[key].numpy().tobytes())
        assert place > 0
        data[place + 8] ^= 1
    elif how == 'truncated':
        data = data[:len(data) // 2]
    elif how == 'text':
        data = b'<html>404</html>'
    path.write_bytes(data)


@each_case('how, message', [
    ('NaN', r'bad.pth: 1 weights have NaN.*conv_seg.projection.conv.weight'),
    ('other network', r'not of the network of the config:\n  \d+ missing: '
     r'backbone[^\n]*, \.\.\.\n  \d+ unexpected: neck\.backbone'),
    ('other width', r'1 of another shape: decode_head.conv_seg.projection.'
     r'conv.weight \(12, 16, 1, 1\) instead of \(16, 16, 1, 1\)'),
    ('code', 'not safe to read'),
    ('empty', 'has no weights'),
    ('one bit', 'checksum of .* does not fit'),
    ('truncated', 'no checkpoint, a damaged one'),
    ('text', 'no checkpoint, a damaged one'),
])
def test_bad_checkpoints_leave_nothing(trained, convert, tmp_path, how,
                                       message):
    bad = tmp_path / 'bad.pth'
    damaged(trained(), how, bad)
    with pytest.raises(SystemExit, match=message) as error:
        convert(trained().config, bad)
    assert str(error.value).startswith('Error: ')
    assert list(tmp_path.iterdir()) == [bad]


def test_other_config_and_other_faults(trained, convert, tool, tmp_path,
                                       monkeypatch):
    run = trained()
    other = CONFIGS / 'stock/erfnet_fcn_1xb8-10k_camvid-360x480.py'
    with pytest.raises(SystemExit, match='not of the network of the config'):
        convert(other, run.weights)
    with pytest.raises(SystemExit, match=r'1 of another shape|\d+ of another'):
        convert(run.config, run.weights, '--cfg-options',
                'model.decode_head.num_classes=7')
    with pytest.raises(SystemExit, match='No such file'):
        convert(run.config, tmp_path / 'none.pth')
    # A disagreement, made by folding with a text that is another one.
    fold = tool.fold_state_dict

    def wrong(model, *args):
        state = fold(model, *args)
        state['decode_head.conv_seg.bias'] += torch.arange(8.)
        return state

    monkeypatch.setattr(tool, 'fold_state_dict', wrong)
    with pytest.raises(SystemExit, match='does not predict what the trained'):
        convert(run.config, run.weights)
    assert not list(tmp_path.iterdir())


@each_case('out, message', [
    ('nowhere/out.pth', 'there is no folder'),
    ('out.pt', 'must end in .pth'),
    ('old.pth', 'old.pth exists'),
    ('here.pth', 'here.py exists'),
])
def test_bad_places_are_refused(trained, convert, tmp_path, capsys, out,
                                message):
    (tmp_path / 'old.pth').touch()
    (tmp_path / 'here.py').touch()
    with pytest.raises(SystemExit) as error:
        convert(trained().config, trained().weights, out=tmp_path / out)
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2


def test_full_disk_leaves_nothing(trained, tmp_path):
    """In a process that may write files of 15 kB only."""
    run = trained()
    code = f'''
import importlib.util, resource, sys
spec = importlib.util.spec_from_file_location('tool', {TOOL!r})
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))
tool.main(sys.argv[1:])
'''
    done = start(
        'python',
        '-c',
        code,
        run.config,
        run.weights,
        tmp_path / 'out.pth',
        *('--num-images', '1'),
        cwd=str(tmp_path),
        fork=True)
    assert done.status == 1, done.output[-3000:]
    assert 'Error: [Errno 27] File too large' in done.output
    assert not list(tmp_path.iterdir())


def test_sizes_of_the_tiny_run_are_what_the_tests_say(trained):
    """So that the file is larger than the disk, and the images small."""
    state = fold_state_dict(trained().model)
    assert sum(v.numel() for v in state.values()) * 4 > 15_000
    assert SIZE == (32, 64)
