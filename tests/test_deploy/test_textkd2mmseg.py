# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The tool that turns a trained text network into a stock one."""
import inspect
import re
from pathlib import Path

import pytest
import torch
from each_case import each_case
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.registry import MODELS
from network_tester import CONFIGS, load_config
from processes import full_disk
from processes import load as load_checkpoint
from processes import start
from tiny import CLASSES, CONTROL, assert_equal, save_weights, tiny_config
from tool_modules import call, fails, load_tool

from mmseg_textkd import compat
from mmseg_textkd.analysis.compare import evaluate
from mmseg_textkd.deploy import fold_state_dict, to_stock_cfg
from mmseg_textkd.deploy.load_stock import dataset_meta

CAMVID = (
    CONFIGS / 'text_classifier' /
    'textkd_pidnet-s_vit-b16_1xb8-10k_camvid-360x480.py')
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
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import MODELS
import mmseg.datasets, mmseg.models

{predictions}

init_default_scope('mmseg')
for name in sys.argv[1:]:
    cfg = Config.fromfile(name + '.py')
    model = MODELS.build(cfg.model).eval()
    checkpoint = torch.load(name + '.pth', weights_only=True)
    model.load_state_dict(checkpoint['state_dict'], strict=True)
    torch.save(predictions(model, cfg), name + '.logits')
'''


@pytest.fixture(scope='module')
def tool():
    """The tool as a module."""
    return load_tool('model_converters/textkd2mmseg.py')


@pytest.fixture
def convert(tool, tmp_path, monkeypatch, capsys):
    """Get a function that runs the tool and gives what it printed."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)

    def go(config, checkpoint, *words, out=tmp_path / 'out.pth'):
        words = ('--device', 'cpu', '--num-images', 4, *words)
        call(tool, config, checkpoint, out, *words)
        return capsys.readouterr().out

    return go


def load(path):
    return torch.load(path, weights_only=True)


def predictions(model, cfg):
    """What the model predicts on all images of the test set."""
    cfg = dict(cfg.test_dataloader, num_workers=0, persistent_workers=False)
    loader = Runner.build_dataloader(cfg)
    with torch.no_grad():
        return [model.test_step(x)[0].seg_logits.data for x in loader]


def relative(printed):
    """The differences that are printed."""
    return [float(v) for v in re.findall(r'relative (\S+) \(', printed)]


def test_classes_of_config_and_checkpoint_are_compared():
    dataset = dict(type='BaseSegDataset', metainfo=dict(classes=['a', 'b']))
    cfg = Config(dict(test_dataloader=dict(dataset=dataset)))
    assert dataset_meta(cfg, dict(classes=('a', 'b')))['classes'] == ('a', 'b')
    for classes, said in ((('a', 'c'), "'c'"), (('a', ), 'None')):
        message = f"1: {said} in the checkpoint, 'b' in"
        with pytest.raises(ValueError, match=message):
            dataset_meta(cfg, dict(classes=classes))


@pytest.mark.stacks
@pytest.mark.filterwarnings('ignore:CamVid test has 2 images')
def test_result_needs_no_plugin(trained, convert, write_camvid, tmp_path):
    """Strict, in a process in which importing the plugin raises."""
    expected = {}
    for name, words in (('plain', ()), ('auxiliary', ['--strip-auxiliary'])):
        run, out = trained(name), tmp_path / f'{name}.pth'
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
    files = tmp_path / 'config.py', tmp_path / 'random.pth'
    convert(*files, out=tmp_path / 'camvid.pth')
    expected['camvid'] = predictions(model, cfg)

    script, lite = tmp_path / 'script.py', 'mmcv.ops' in compat.apply()
    code = WITHOUT_PLUGIN.replace('{lite}', str(lite))
    code = code.replace('{predictions}', inspect.getsource(predictions))
    script.write_text(code)
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
    meta, palette = out['meta'], [[i, i, i] for i in range(8)]
    assert meta['dataset_meta'] == dict(classes=CLASSES, palette=palette)
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
    found = relative(printed)
    assert len(found) == 3 and all(0 < v < 1e-5 for v in found)
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
        state = sorted(load(again)['state_dict'].items())
        assert_equal(state, sorted(first['state_dict'].items()))
        own = tmp_path / f'{name}.py'
        assert own.read_text() == (tmp_path / 'out.py').read_text()
        meta, kept = load(again)['meta'], first['meta']
        for key in ('iter', 'seed', 'time', 'trained_with', 'training_cfg'):
            assert meta[key] == kept[key]
    # Stripped, then and later.
    a, c, d = (tmp_path / f'{name}.pth' for name in 'acd')
    convert(run.config, a, '--strip-auxiliary', out=c)
    convert(run.config, c, out=d)
    left = {k for k in first['state_dict'] if k[:10] != 'auxiliary_'}
    assert left < set(first['state_dict'])
    for name in 'cd':
        assert set(load(tmp_path / f'{name}.pth')['state_dict']) == left
        cfg = Config.fromfile(tmp_path / f'{name}.py')
        assert 'auxiliary_head' not in cfg.model


def test_weights_of_distillation_losses_are_left_out(convert, tmp_path):
    cfg = tiny_config(tmp_path)
    state = MODELS.build(cfg.model).state_dict()
    extra = {'distill_losses.0.align.weight': torch.zeros(24, 16, 1, 1)}
    torch.save(dict(state_dict={**state, **extra}), tmp_path / 'w.pth')
    cfg.model.update(
        type='DistilledEncoderDecoder',
        teacher=dict(config='teacher.py', checkpoint='teacher.pth'),
        distill_losses=[
            dict(
                type='ChannelWiseDistillationLoss',
                on='features',
                align=(16, 24))
        ])
    cfg.dump(tmp_path / 'c.py')
    convert(tmp_path / 'c.py', tmp_path / 'w.pth')
    assert_equal(load(tmp_path / 'out.pth')['state_dict'], dict(state))


def test_half_precision_and_bare_weights(trained, convert, tmp_path):
    """A state dict alone, with fp16 values; its classes are the config's."""
    run = trained()
    state = load_checkpoint(run.weights)['state_dict']
    half = {f'module.{k}': v for k, v in state.items()}
    for key, value in half.items():
        half[key] = value.half() if value.is_floating_point() else value
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
    keep, near = tmp_path / 'keep.pth', tmp_path / 'near.pth'
    printed = convert(run.config, run.weights, '--l2', 'keep', out=keep)
    assert 'APPROXIMATE' not in printed
    kept = Config.fromfile(tmp_path / 'keep.py')
    assert kept.custom_imports.imports == ['mmseg_textkd.deploy']
    model = MODELS.build(kept.model).eval()
    model.load_state_dict(load(keep)['state_dict'])
    for a, b in zip(predictions(model, kept), predictions(run.model, run.cfg)):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
    words = '--l2', 'approximate', '--num-images', '3'
    printed = convert(run.config, run.weights, *words, out=near)
    assert 'THE FOLD IS APPROXIMATE' in printed and '3 images: max' in printed
    assert min(relative(printed)) > 1e-4
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
        for name in [k for k in state if 'backbone' in k]:
            state[f'neck.{name}'] = state.pop(name)
    elif how == 'other width':
        state[key] = torch.zeros(12, 16, 1, 1)
    elif how == 'code':
        checkpoint['meta']['note'] = Path('run me')
    elif how == 'empty':
        checkpoint = dict(meta={})
    torch.save(checkpoint, path)
    if how == 'text':
        path.write_bytes(b'<html>404</html>')


@each_case('how, message', [
    ('NaN', r'bad.pth: 1 weights have NaN.*conv_seg.projection.conv.weight'),
    ('other network', r'not of the network of the config:\n  \d+ missing: '
     r'backbone[^\n]*, \.\.\.\n  \d+ unexpected: neck\.backbone'),
    ('other width', r'1 of another shape: decode_head.conv_seg.projection.'
     r'conv.weight \(12, 16, 1, 1\) instead of \(16, 16, 1, 1\)'),
    ('code', 'not safe to read'),
    ('empty', 'has no weights'),
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


def test_bad_places_are_refused(trained, tool, tmp_path, capsys):
    (tmp_path / 'old.pth').touch()
    (tmp_path / 'here.py').touch()
    files = trained().config, trained().weights
    for out, message in [
        ('nowhere/out.pth', 'there is no folder'),
        ('out.pt', 'must end in .pth'),
        ('old.pth', 'old.pth exists'),
        ('here.pth', 'here.py exists'),
    ]:
        said = fails(tool, capsys, *files, tmp_path / out)
        assert said.startswith('2 ') and message in said
    assert len(list(tmp_path.iterdir())) == 2


def test_full_disk_leaves_nothing(trained, convert, tmp_path):
    run = trained()
    state = fold_state_dict(run.model)
    assert sum(v.numel() for v in state.values()) * 4 > 15_000
    with full_disk(15_000):
        with pytest.raises(SystemExit, match='Error: .*File too large'):
            convert(run.config, run.weights)
    assert not list(tmp_path.iterdir())


def test_weights_of_timm_are_not_needed(tmp_path):
    """Those of the checkpoint are all; the tools that read it say so."""
    pytest.importorskip('timm')
    cfg = tiny_config(tmp_path, CONTROL)
    cfg.model.backbone = dict(
        type='TIMMBackbone',
        model_name='tf_efficientnet_lite0',
        features_only=True,
        pretrained=False,
        out_indices=[1])
    cfg.model.decode_head.update(in_channels=24, in_index=0)
    save_weights(tmp_path / 'text.pth', MODELS.build(cfg.model))
    cfg.model.backbone.checkpoint_path = str(tmp_path / 'gone.pth')
    cfg.dump(tmp_path / 'text.py')
    pair = tmp_path / 'text.py', tmp_path / 'text.pth'
    call('model_converters/textkd2mmseg.py', *pair, '--out',
         tmp_path / 'folded.pth')
    call('model_converters/publish_model.py', tmp_path / 'text.pth',
         tmp_path / 'out', '--config', tmp_path / 'text.py', '--keep-text')
    call('model_converters/mmseg2textkd.py', tmp_path / 'text.py',
         tmp_path / 'folded.pth', '--out', tmp_path / 'start.pth')
    found = evaluate(str(pair[0]), pair[1], tmp_path / 'work')
    assert found['images'] == 6
