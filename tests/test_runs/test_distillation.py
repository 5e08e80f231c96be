# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Both teachers in real runs: stages, resuming, AMP, ranks, release."""
import copy
from types import SimpleNamespace

import pytest
import torch
from each_case import each_case
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from mmseg.registry import DATASETS, HOOKS, MODELS
from processes import TRAIN, load, start_ranks
from tiny import (CLASSES, SIZE, assert_apart, assert_equal, folded, residual,
                  run, stop_and_resume, tiny_config, without_loops)

from mmseg_textkd import add_region_embeddings
from mmseg_textkd.clip.image_tower import ImageTower
from mmseg_textkd.datasets.encode_regions import ensure_regions
from mmseg_textkd.deploy import fold_state_dict, to_stock_cfg
from mmseg_textkd.engine import TeacherHook
from mmseg_textkd.text.encode_classes import ensure_embeddings

GUIDED = 'decode.loss_text_guided'
TEXT_LOSSES = [
    dict(type='TextGuidedDistillationLoss', min_pixels=1),
    dict(
        type='TextGuidedDistillationLoss',
        teacher='segmentor',
        loss_name='loss_text_prototypes'),
    dict(type='TextSimilarityDistillationLoss')
]
CWD = dict(type='ChannelWiseDistillationLoss')
FEATURES = dict(CWD, on='features', align=(16, 12))
DISTILL_LOSSES = [
    dict(type='LogitDistillationLoss'), CWD,
    dict(FEATURES, loss_name='loss_cwd_features')
]
DISTILLED = {f'distill.loss_{n}' for n in ('kd', 'cwd', 'cwd_features')}
NAMES = DISTILLED | {
    GUIDED, 'decode.loss_text_prototypes', 'decode.loss_text_similarity'
}


@HOOKS.register_module()
class NoteHook(Hook):
    """Keep the losses."""

    def __init__(self):
        self.losses = []

    def after_train_iter(self, runner, outputs, **kwargs):
        self.losses.append({k: v.item() for k, v in outputs.items()})


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """Data, vectors of ToyCLIP, and a wider teacher of three iterations."""
    root = tmp_path_factory.mktemp('distillation')
    cfg = tiny_config(root, max_iters=3)
    cfg.model.decode_head.channels = 12
    cfg.model.data_preprocessor.mean = [100.] * 3
    cfg.train_cfg.val_interval = 9
    run(cfg, work_dir=str(root / 'teacher'))
    cfg.dump(str(root / 'teacher.py'))
    return root


def config(root, role='classifier', switch_at=2, max_iters=4, **options):
    """Both teachers and all losses at once."""
    build = dict(model='toyclip', vocabulary=list(CLASSES), templates='photo')
    text = residual(str(root / 'toy.safetensors'), build=build)
    hook = dict(switch_at=switch_at)
    if role == 'auxiliary':
        hook['learn'] = ['.']
    cfg = tiny_config(root, text, hook, max_iters, 1, **options)
    cfg.train_cfg.val_interval = max_iters if role == 'auxiliary' else 99
    cfg.model.type = 'DistilledEncoderDecoder'
    cfg.model.teacher = dict(
        config=str(root / 'teacher.py'),
        checkpoint=str(root / 'teacher' / 'iter_3.pth'))
    cfg.model.distill_losses = copy.deepcopy(DISTILL_LOSSES)
    cfg.model.decode_head.update(
        role=role, text_losses=copy.deepcopy(TEXT_LOSSES))
    cfg.train_dataloader = add_region_embeddings(
        cfg.train_dataloader.to_dict(),
        dict(
            type='LoadRegionEmbeddings',
            folder=str(root / 'regions'),
            model='toyclip',
            min_pixels=1))
    cfg.custom_hooks += [dict(type='TeacherHook'), dict(type='NoteHook')]
    ensure_embeddings(cfg)
    return cfg


def stock_student(root, losses=DISTILL_LOSSES):
    """A network without text, with the peers alone."""
    cfg = tiny_config(root, max_iters=2)
    cfg.model.type = 'DistilledEncoderDecoder'
    cfg.model.teacher = config(root).model.teacher
    cfg.model.distill_losses = copy.deepcopy(losses)
    cfg.custom_hooks = [dict(type='TeacherHook'), dict(type='NoteHook')]
    return cfg


def notes(runner, names=NAMES):
    """The losses of each iteration, of which all are optimized."""
    hook, = (h for h in runner.hooks if isinstance(h, NoteHook))
    for values in hook.losses:
        assert names <= set(values)
        assert all(0 < values[n] < float('inf') for n in NAMES)
        total = sum(v for k, v in values.items() if 'loss_' in k)
        assert values['loss'] == pytest.approx(total, rel=1e-5)
    return hook.losses


@pytest.fixture(scope='module')
def whole(root):
    """An uninterrupted run, the first one: it fills the folder."""
    cfg = config(root)
    ensure_regions(cfg)
    cfg.custom_hooks.append(dict(type='EMAHook', momentum=.3))
    return run(cfg, work_dir=str(root / 'whole'))


@pytest.mark.stacks
def test_all_losses_go_through_both_stages(root, whole):
    assert len(notes(whole)) == 4
    states = [load(root / f'whole/iter_{i}.pth') for i in (1, 2, 3, 4)]
    states = [state['ema_state_dict'] for state in states]
    gamma = 'module.decode_head.text_losses.0.gamma.log_scale'
    values = [state[gamma].item() for state in states]
    # The factors are text: they learn in both stages.
    assert 0 not in values and len(set(values)) == 4
    offset = 'module.decode_head.conv_seg.text.offset'
    assert states[1][offset].abs().max() == 0
    assert states[3][offset].abs().max() > 0
    align = 'module.distill_losses.2.align.weight'
    assert not torch.equal(states[0][align], states[1][align])
    assert torch.equal(states[1][align], states[3][align])


@pytest.mark.stacks
def test_the_teacher_is_nowhere_and_untouched(root, whole):
    model = whole.model
    saved = load(root / 'teacher' / 'iter_3.pth')['state_dict']
    assert_equal(dict(model.teacher.model.state_dict()), dict(saved))
    assert_apart(whole, model.teacher.model.parameters())
    assert not any(p.requires_grad for p in model.teacher.model.parameters())
    assert not model.train().teacher.model.training
    assert copy.deepcopy(model).teacher is model.teacher
    assert not any(isinstance(m, ImageTower) for m in model.modules())


@pytest.mark.stacks
def test_a_resumed_run_is_the_uninterrupted_one(root, whole, monkeypatch):
    """Cut in stage 2; and no image tower is needed any more."""

    def refuse(*args):
        raise AssertionError('the image tower was loaded')

    monkeypatch.setattr(ImageTower, '__init__', refuse)
    cfg = config(root)
    assert ensure_regions(cfg) == 0
    cfg.custom_hooks.append(dict(type='EMAHook', momentum=.3))
    resumed = stop_and_resume(cfg, 3, root / 'cut')
    assert notes(resumed) == notes(whole)[3:]
    expected, got = (load(root / n / 'iter_4.pth') for n in ('whole', 'cut'))
    for part in ('state_dict', 'ema_state_dict', 'optimizer'):
        assert_equal(got[part], expected[part], part)


def add_everything(root, cfg):
    """Synonyms, structure loss and a bridge beside both teachers."""
    build = dict(model='toyclip', templates='photo', keep_bank=True)
    build['vocabulary'] = {name: [name, f'a {name}'] for name in CLASSES}
    head = cfg.model.decode_head
    head.text.embeddings = dict(
        type='SynonymSampler', file=f'{root}/phrases.safetensors', build=build)
    head.text_losses += [
        dict(type='SemanticStructureLoss', min_pixels=1),
        dict(type='TextAlignmentLoss', loss_weight=0.4)
    ]
    head.fusion = dict(type='TwoWayBridge', width=8, num_heads=2)
    ensure_embeddings(cfg)
    return {
        f'decode.loss_{name}'
        for name in ('structure', 'text_align', 'bridge_ce', 'bridge_kl')
    }


@pytest.mark.stacks
@each_case('role', ['classifier', 'auxiliary'])
def test_what_is_deployed_is_stock(root, role):
    """In mixed precision, as a classifier with all other text knowledge."""
    cfg = config(root, role, **{'optim_wrapper.type': 'CPUAmpOptimWrapper'})
    more = add_everything(root, cfg) if role == 'classifier' else set()
    runner = run(cfg, work_dir=str(root / role))
    notes(runner, NAMES | more)
    model = runner.model
    offset = model.decode_head.text_branch.text.offset
    assert role == 'auxiliary' or offset.abs().max() > 0
    stock_cfg = to_stock_cfg(cfg)
    expected = to_stock_cfg(tiny_config(root, max_iters=4))
    assert stock_cfg.model == expected.model
    assert stock_cfg.train_dataloader == expected.train_dataloader
    assert stock_cfg.custom_hooks == [dict(type='NoteHook')]
    inputs, stock = torch.randn(2, 3, *SIZE), folded(cfg, model)
    with torch.no_grad():
        logits = stock(inputs), model(inputs)
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert torch.equal(logits[0].argmax(1), logits[1].argmax(1))


def first_batch(cfg):
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    return next(iter(loader))


def fresh(cfg):
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model


def step(model, batch, optimizer):
    model.train()
    return model.train_step(copy.deepcopy(batch), optimizer)


def test_a_stock_network_learns_from_the_teacher_too(root):
    cfg, plain_cfg = stock_student(root), tiny_config(root)
    batch, losses = first_batch(cfg), []
    for peers in (cfg.model.distill_losses, [], None):
        cfg.model.distill_losses = peers
        model = fresh(plain_cfg if peers is None else cfg)
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
        losses.append(step(model, batch, optimizer))
        if peers:
            stock = MODELS.build(plain_cfg.model)
            extra = set(model.state_dict()) - set(stock.state_dict())
            assert extra == {
                'distill_losses.2.align.weight', 'distill_losses.2.align.bias'
            }
            stock.load_state_dict(fold_state_dict(model.eval()), strict=True)
    # The network's own losses are those of the plain network.
    distilled, alone, plain = losses
    assert alone == plain
    assert set(distilled) - set(plain) == DISTILLED
    assert distilled['decode.loss_ce'] == plain['decode.loss_ce']


def test_the_student_gets_nearer_to_the_teacher(root):
    """By logit distillation alone, on the same images."""
    cfg = stock_student(root, DISTILL_LOSSES[:1])
    cfg.model.decode_head.loss_decode.loss_weight = 0.
    model, batch = fresh(cfg), first_batch(cfg)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    losses = [step(model, batch, optimizer) for _ in range(8)]
    losses = [values['distill.loss_kd'].item() for values in losses]
    assert losses[-1] < .7 * losses[0]


@pytest.mark.stacks
def test_what_the_teacher_sees(root):
    """Its own normalization, its own logits, on the student's inputs."""
    cfg = stock_student(root)
    model = MODELS.build(cfg.model)
    teacher = model.teacher.model
    pictures = 255 * torch.rand(2, 3, *SIZE)
    own = model.data_preprocessor
    inputs = (pictures - own.mean) / own.std
    theirs = teacher.data_preprocessor
    assert not torch.equal(own.mean, theirs.mean)
    with torch.no_grad():
        expected = teacher((pictures - theirs.mean) / theirs.std)
    seen = model.teacher(inputs, own)
    logits, features = seen['logits'], seen['features']
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(teacher.decode_head.conv_seg(features), logits)
    # Blue and red change places.
    cfg.model.data_preprocessor.bgr_to_rgb = True
    swapped = MODELS.build(cfg.model).data_preprocessor
    flipped = model.teacher(inputs.flip(1), swapped)
    torch.testing.assert_close(flipped['logits'], logits)
    assert not any(m._forward_hooks for m in teacher.modules())
    before = torch.get_rng_state()
    model.teacher._model = None
    assert model.teacher.classes == CLASSES
    assert torch.equal(torch.get_rng_state(), before)


def start_training(cfg):
    """What a runner does up to the first losses."""
    model = MODELS.build(cfg.model)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    runner = SimpleNamespace(
        model=model, train_dataloader=SimpleNamespace(dataset=dataset))
    TeacherHook().before_train(runner)
    model.loss(torch.zeros(1, 3, *SIZE), [])


def test_bad_teachers(root, tmp_path):
    cfg = stock_student(root)
    good = cfg.model.teacher.checkpoint

    checkpoint = 'model.teacher.checkpoint'
    saved = load(good)
    names = list(CLASSES)
    names[1:3] = names[2:0:-1]
    saved['meta']['dataset_meta']['classes'] = names
    torch.save(saved, tmp_path / 'others.pth')
    saved['meta'] = dict(CLASSES=names)
    torch.save(saved, tmp_path / 'old.pth')
    for key, value, kind, message in [
        (checkpoint, str(tmp_path / 'none.pth'), FileNotFoundError,
         'no checkpoint .*none.pth of the teacher'),
        ('model.teacher.cfg_options', {
            'model.decode_head.channels': 10
        }, ValueError, 'is not of the network of the config'),
        (checkpoint, str(tmp_path / 'others.pth'), ValueError,
         "on the same:\n  1: 'road' in the teacher, 'building' in the data"),
            # As MMSegmentation 0.x names them.
        (checkpoint, str(tmp_path / 'old.pth'), ValueError,
         "1: 'road' in the teacher"),
        ('model.decode_head.num_classes', 9, ValueError,
         'has 8 classes, but the student 9')
    ]:
        bad = copy.deepcopy(cfg)
        bad.merge_from_dict({key: value})
        with pytest.raises(kind, match=message):
            start_training(bad)
    plain = tiny_config(root)
    with pytest.raises(ValueError, match='found no teacher'):
        start_training(plain)


def test_two_ranks(root):
    """Everything at once, from an empty folder, through the switch."""
    cfg = config(root)
    cfg.train_dataloader.dataset.pipeline[2].folder = str(root / 'ranks')
    cfg.custom_hooks = cfg.custom_hooks[:-1]  # of this module
    cfg.default_hooks.checkpoint.interval = 4
    without_loops(cfg)
    cfg.log_level = 'INFO'
    cfg.dump(str(root / 'ranks.py'))
    words = TRAIN, root / 'ranks.py', '--work-dir', root / 'ranks_work'
    done = start_ranks(*words, cwd=root)
    assert done.status == 0, done.output[-4000:]
    assert done.output.count('Made the region embeddings of 6 images') == 1
    assert 'distill.loss_kd' in done.output and GUIDED in done.output
    assert load(root / 'ranks_work' / 'iter_4.pth')['meta']['iter'] == 4
