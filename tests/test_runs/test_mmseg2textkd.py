# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Text runs that start from a trained stock checkpoint."""
import copy
import os.path as osp
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmengine.registry import MODELS
from mmengine.runner import Runner, load_checkpoint
from processes import TOOLS, load, start
from tiny import (AUXILIARY, CLASSES, changed, residual, run, tiny_config,
                  write_vectors)
from tool_modules import load_tool

from mmseg_textkd.text import TextEmbeddings

TOOL = osp.join(TOOLS, 'model_converters', 'mmseg2textkd.py')
KEY = 'decode_head.conv_seg'


def config(folder, text=None, hook=None, **options):
    """The tiny network with an auxiliary head."""
    cfg = tiny_config(folder, text, hook, **options)
    cfg.model.auxiliary_head = AUXILIARY
    cfg.log_level = 'WARNING'
    return cfg


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A stock run that has learned something, and the tool's result."""
    folder = tmp_path_factory.mktemp('stock')
    cfg = config(folder, max_iters=60)
    cfg.optim_wrapper.optimizer.lr = 0.2
    run(cfg)
    write_vectors(folder / 'text.safetensors', 1)
    record = TextEmbeddings.load(folder / 'text.safetensors')
    replace(record, names=CLASSES[::-1]).save(folder / 'reversed.safetensors')
    checkpoint = folder / 'work' / 'iter_60.pth'
    text = residual(folder / 'text.safetensors')
    textual = config(folder, text, dict(switch_at=0.5), max_iters=2)
    textual.dump(folder / 'config.py')
    made = ('config.py', checkpoint, 'made/out.pth', '--num-images', '12')
    done = start('python', TOOL, *made, cwd=folder)
    assert done.status == 0, done.output[-3000:]
    return SimpleNamespace(
        folder=folder,
        cfg=cfg,
        checkpoint=checkpoint,
        text=text,
        textual=textual,
        out=folder / 'made' / 'out.pth',
        printed=done.output)


@pytest.fixture
def convert(trained, tmp_path, monkeypatch):
    """Get a function that runs the tool in this process."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)
    tool = load_tool(TOOL)

    def go(cfg=trained.textual, checkpoint=trained.checkpoint, *words):
        path, out = tmp_path / 'config.py', tmp_path / 'out.pth'
        cfg.dump(path)
        if isinstance(checkpoint, dict):
            torch.save(checkpoint, tmp_path / 'in.pth')
            checkpoint = tmp_path / 'in.pth'
        # Twice the training images; of repeated options the last one counts.
        words = (path, checkpoint, out, '--num-images', 12, *words)
        tool.main([str(w) for w in words])
        return out

    return go


@pytest.fixture
def cfg(trained, tmp_path):
    """A copy of the config with text."""
    cfg = copy.deepcopy(trained.textual)
    cfg.work_dir = str(tmp_path)
    return cfg


@pytest.fixture
def stock(trained):
    """The stock checkpoint."""
    return load(trained.checkpoint)


def first_loss(cfg, load_from, name):
    """The loss of the first iteration of a run."""
    cfg = copy.deepcopy(cfg)
    cfg.load_from, cfg.work_dir = str(load_from), f'{cfg.work_dir}_{name}'
    runner = run(cfg, **{'train_cfg.max_iters': 2})
    return runner.message_hub.get_scalar('train/decode.loss_ce').data[0][0]


def built(cfg, checkpoint):
    """A model with weights that fit without a word."""
    model = MODELS.build(cfg.model)
    load_checkpoint(model, str(checkpoint), strict=True)
    return model


@pytest.mark.stacks
def test_what_the_tool_says(trained):
    # MMEngine's standard message: what was left over and what was missing.
    assert f'unexpected key in source state_dict: {KEY}.weight' in (
        trained.printed)
    assert f'{KEY}.projection.conv.weight' in trained.printed
    found = re.findall(
        r'least squares (\S+)\n|by at most (\S+), on|same class at (\S+) %',
        trained.printed)
    least, exact, same, near, nearly = (float(''.join(v)) for v in found)
    assert least < 1e-10 and exact < 1e-4 and same == 100
    assert exact < near and 80 < nearly <= 100
    assert 'evaluation mode, val images' in trained.printed
    assert 'training mode, as in the first iteration, train images' in (
        trained.printed)
    assert [p.name for p in trained.out.parent.iterdir()] == ['out.pth']


@pytest.mark.stacks
def test_losses_of_step_0_are_those_of_the_stock_network(trained):
    stock = built(trained.cfg, trained.checkpoint)
    text = built(trained.textual, trained.out)
    loader = Runner.build_dataloader(trained.cfg.train_dataloader, seed=3)
    batch = next(iter(loader))
    expected, losses = (
        m.eval().loss(**m.data_preprocessor(batch, True))
        for m in (stock, text))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    # In training mode, in runs with the same batches.
    old = first_loss(trained.cfg, trained.checkpoint, 'stock')
    new = first_loss(trained.textual, trained.out, 'text')
    random = first_loss(trained.textual, trained.checkpoint, 'random')
    assert new == pytest.approx(old, rel=0.1)
    assert random > 2 * old


@pytest.mark.stacks
def test_result_is_a_plain_checkpoint(trained):
    saved = torch.load(trained.out, weights_only=True)
    assert saved.keys() == {'state_dict', 'meta'}
    meta = saved['meta']
    assert tuple(meta['dataset_meta']['classes']) == CLASSES
    assert len(meta['dataset_meta']['palette']) == len(CLASSES)
    assert meta['stock_checkpoint'] == 'iter_60.pth'
    for key, value in load(trained.checkpoint)['state_dict'].items():
        if not key.startswith(f'{KEY}.'):
            assert torch.equal(saved['state_dict'][key], value), key


def load_as_a_run(cfg, load_from, capsys):
    """The state before and after, and what MMEngine printed about it."""
    cfg.load_from, cfg.experiment_name = str(load_from), cfg.work_dir
    runner = Runner.from_cfg(cfg)
    before = {k: v.clone() for k, v in runner.model.state_dict().items()}
    capsys.readouterr()
    runner.load_or_resume()
    return before, runner.model.state_dict(), capsys.readouterr().out


def test_run_from_the_result_goes_on_with_the_same_text(trained, cfg, capsys):
    _, state, printed = load_as_a_run(cfg, trained.out, capsys)
    assert 'Loads checkpoint' in printed and 'do not match' not in printed
    saved = load(trained.out)['state_dict']
    assert saved.keys() == state.keys()
    file = trained.text['embeddings']['file']
    torch.testing.assert_close(saved[f'{KEY}.text.class_embeddings'],
                               TextEmbeddings.load(file).vectors)
    runner = run(cfg)
    with open(osp.join(runner.log_dir, f'{runner.timestamp}.log')) as log:
        assert 'The class embeddings in the loaded' not in log.read()


def missing_keys(printed):
    found = re.search('missing keys in source state_dict: (.*)', printed)
    return set(found[1].split(', '))


def variants(checkpoint):
    """Other forms in which stock weights come."""
    state = checkpoint['state_dict']
    wrapped = {f'module.{k}': v for k, v in state.items()}
    meta = dict(CLASSES=list(CLASSES), PALETTE=None)
    return dict(
        bare=state,
        wrapped=dict(state_dict=wrapped),
        old=dict(state_dict=state, meta=meta),
        # Of EMAHook: the averages are where they are looked for.
        averaged=dict(checkpoint, ema_state_dict=dict(steps=torch.tensor(3))))


@pytest.mark.parametrize('form', ['bare', 'wrapped', 'old', 'averaged'])
def test_other_forms_of_a_checkpoint(convert, trained, stock, capsys, form):
    made = load(convert(trained.textual, variants(stock)[form]))['state_dict']
    assert not changed(load(trained.out)['state_dict'], made)
    named = form in ('old', 'averaged')
    assert ('are not named' in capsys.readouterr().out) is not named


def test_saved_statistics_that_lag_behind_do_no_harm(convert, trained, stock,
                                                     capsys):
    """A short run leaves such; its first iteration does not use them."""
    for key, value in stock['state_dict'].items():
        if key.endswith('running_var'):
            value.mul_(9)
    made = load(convert(trained.textual, stock))['state_dict']
    differ = changed(load(trained.out)['state_dict'], made)
    assert not any(key.startswith(f'{KEY}.') for key in differ)
    assert 'same class at 100.0000 %' in capsys.readouterr().out


def test_auxiliary_role_keeps_the_stock_classifier(convert, cfg, stock,
                                                   capsys):
    cfg.model.decode_head.role = 'auxiliary'
    out = convert(cfg)
    assert 'the text branch starts fresh' in capsys.readouterr().out
    old, new = stock['state_dict'], load(out)['state_dict']
    assert old.keys() == new.keys() and not changed(old, new)
    before, after, printed = load_as_a_run(cfg, out, capsys)
    missing = missing_keys(printed)
    assert missing and all('.text_' in key for key in missing)
    assert 'unexpected' not in printed and 'mismatch' not in printed
    for key, value in after.items():
        assert torch.equal(value, before[key] if '.text_' in key else old[key])


def test_text_on_an_auxiliary_head(convert, trained, cfg, stock, capsys):
    head = dict(AUXILIARY, type='TextFCNHead', text=trained.text)
    cfg.model.auxiliary_head = [head]
    stock['state_dict'] = {
        k.replace('auxiliary_head.', 'auxiliary_head.0.'): v
        for k, v in stock['state_dict'].items()
    }
    model = built(cfg, convert(cfg, stock)).eval()
    for name in ('decode_head', 'auxiliary_head.0'):
        conv = model.get_submodule(f'{name}.conv_seg').as_conv()
        expected = stock['state_dict'][f'{name}.conv_seg.weight']
        torch.testing.assert_close(conv.weight, expected, rtol=1e-4, atol=1e-5)
    printed = capsys.readouterr().out
    assert printed.count('same class at 100.0000 %') >= 2
    assert 'auxiliary_head.0: 8 classes' in printed


def test_one_image_at_a_time(convert, cfg, capsys):
    """Pooled features have no batch statistics of a single image."""
    cfg.train_dataloader.batch_size = 1
    assert load(convert(cfg))['state_dict']
    printed = capsys.readouterr().out
    assert 'two at a time' in printed and '8 classes' in printed


def test_without_validation_images(convert, cfg, capsys):
    cfg.val_dataloader.dataset.data_prefix.img_path = 'nowhere'
    # A sampler that ends: after six images it begins again.
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
    convert(cfg)
    printed = capsys.readouterr().out
    assert 'No validation images' in printed and 'nowhere' in printed
    assert 'evaluation mode, train images' in printed
    assert f'of {12 * 8 * 16} pixels' in printed


def test_more_classes_than_dimensions_are_reported(convert, trained, cfg,
                                                   tmp_path, capsys):
    record = TextEmbeddings.load(trained.text['embeddings']['file'])
    file = tmp_path / 'narrow.safetensors'
    replace(record, vectors=F.normalize(record.vectors[:, :3])).save(file)
    cfg.model.decode_head.text = residual(file)
    convert(cfg)
    printed = capsys.readouterr().out
    assert 'more classes than its width' in printed
    assert 0.1 < float(re.search(r'least squares (\S+)', printed)[1]) < 1


# ------------------------------------------------------- bad input
SWAPPED = [CLASSES[i] for i in (0, 6, 2, 3, 4, 5, 1, 7)]
ONES = torch.ones(16, 24, 1, 1)
TEXTUAL = dict(weight=None, bias=None, projection__conv__weight=ONES[:, :16])
# What is stored of the classifier, the classes, and what is said.
BAD = [
    (dict(weight=ONES[:5, :16], bias=ONES[0, :5, 0, 0]), 'abcde',
     "has 5 classes ['a', 'b', 'c', 'd', 'e']; num_classes=8; "
     'plain `load_from`; in.pth'),
    (dict(weight=ONES[:8]), CLASSES,
     '24 input channels; decode_head has 16; in.pth'),
    ({}, SWAPPED,
     "in another order; 1: 'truck' in the checkpoint, 'building' in the "
     "data set; 6: 'building' in the checkpoint; in.pth"),
    (dict(weight=None), CLASSES, f'has no {KEY}.weight and .bias; '
     "['auxiliary_head', 'backbone', 'decode_head']; in.pth"),
    (TEXTUAL, CLASSES, 'has a text classifier; `load_from`; in.pth'),
    (dict(weight=torch.nan * ONES[:8, :16]), CLASSES, 'NaN or infinity'),
]


def refused(convert, tmp_path, *args):
    """Run the tool where it must fail; what it says."""
    before = {*tmp_path.rglob('*')}
    with pytest.raises(SystemExit) as info:
        convert(*args)
    given = {tmp_path / 'config.py', tmp_path / 'in.pth'}
    assert {*tmp_path.rglob('*')} - given <= before
    assert str(info.value).startswith('Error: ')
    return str(info.value)


@each_case('stored, classes, words', BAD)
def test_bad_checkpoint(convert, trained, tmp_path, stored, classes, words):
    checkpoint = load(trained.checkpoint)
    for key, value in stored.items():
        key = f'{KEY}.{key.replace("__", ".")}'
        checkpoint['state_dict'][key] = value
        if value is None:
            del checkpoint['state_dict'][key]
    checkpoint['meta']['dataset_meta']['classes'] = tuple(classes)
    error = refused(convert, tmp_path, trained.textual, checkpoint)
    assert all(word in error for word in words.split('; ')), error


@pytest.mark.parametrize('content', [None, b'', b'not a checkpoint'])
def test_no_checkpoint(convert, trained, tmp_path, content):
    if content is not None:
        (tmp_path / 'in.pth').write_bytes(content)
    error = refused(convert, tmp_path, trained.textual, tmp_path / 'in.pth')
    assert 'in.pth' in error
    assert ('can not be found' in error) is (content is None)


EMBEDDINGS = 'model.decode_head.text.embeddings'


@each_case(
    'key, change, words',
    [
        ('model.decode_head', dict(text_branch=dict(norm='l2')),
         ["norm='l2'", "norm='bn'"]),
        (EMBEDDINGS, dict(file='gone.safetensors',
                          dim=16), ['gone.safetensors', 'encode_text.py']),
        # Vectors of these, in another order.
        (EMBEDDINGS, dict(file='{folder}/reversed.safetensors'),
         ['in another order', 'BaseSegDataset']),
        ('train_dataloader.dataset.data_prefix', dict(img_path='gone'),
         ['gone']),
        (None, None, ['no text head', 'config.py']),
    ])
def test_bad_config(convert, trained, tmp_path, key, change, words):
    cfg = copy.deepcopy(trained.textual if key else trained.cfg)
    if key:
        cfg.merge_from_dict({key: change})
    if key == EMBEDDINGS:
        file = cfg.model.decode_head.text.embeddings
        file.file = file.file.format(folder=trained.folder)
    error = refused(convert, tmp_path, cfg)
    assert all(word in error for word in words), error


def test_bad_arguments(convert, trained, tmp_path, capsys):
    (tmp_path / 'out.pth').write_bytes(b'precious')
    with pytest.raises(SystemExit):
        convert()
    assert 'out.pth exists' in capsys.readouterr().err
    assert (tmp_path / 'out.pth').read_bytes() == b'precious'
    with pytest.raises(SystemExit):
        convert(trained.textual, 'any.pth', '--num-images', '0')
    assert 'at least 1' in capsys.readouterr().err


# -------------------------------------------- load_from without the tool
@pytest.mark.stacks
def test_plain_load_from_of_another_k_says_what_it_left(
        trained, cfg, tmp_path, capsys):
    """MMEngine's own message; the rest taken over, the text untouched."""
    five = copy.deepcopy(trained.cfg.model)
    five.decode_head.num_classes = five.auxiliary_head.num_classes = 5
    weights = MODELS.build(five).state_dict()
    torch.save(dict(state_dict=weights, meta={}), tmp_path / 'five.pth')
    before, after, printed = load_as_a_run(cfg, tmp_path / 'five.pth', capsys)
    for part in ('weight', 'bias'):
        assert re.search(
            f'size mismatch for auxiliary_head.conv_seg.{part}.*5.*8', printed)
    assert (f'unexpected key in source state_dict: {KEY}.weight, {KEY}.bias'
            in printed)
    own = {k for k in after if k.startswith(f'{KEY}.')}
    counters = {k for k in own if k.endswith('num_batches_tracked')}
    assert missing_keys(printed) == own - counters
    kept = own | {f'auxiliary_head.conv_seg.{p}' for p in ('weight', 'bias')}
    for key, value in after.items():
        assert torch.equal(value, (before if key in kept else weights)[key])
