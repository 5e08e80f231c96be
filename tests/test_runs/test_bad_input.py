# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Bad input to a whole run: a clear error, in time, and no damage."""
from pathlib import Path

import pytest
from each_case import each_case
from mmengine.config import Config
from mmengine.runner import Runner
from processes import ROOT
from tiny import (CLASSES, CONTROL, PROMPTS, assert_equal, residual, run,
                  tiny_config)

from mmseg_textkd.models.text_providers import ContextPromptLearner
from mmseg_textkd.text.encode_classes import encode_classes


def test_damaged_file(tmp_path, make_embeddings):
    """With a width too: a file that is there is never passed over."""
    file = Path(make_embeddings(8, names=list(CLASSES)))
    data = file.read_bytes()[:999]
    file.write_bytes(data)
    with pytest.raises(ValueError, match='cut short or damaged') as error:
        run(tiny_config(tmp_path, residual(file, dim=16), dict(switch_at=3)))
    assert str(file) in str(error.value) and file.read_bytes() == data
    assert not list(tmp_path.glob('work/*.pth'))


def learner(dim):
    return dict(
        type='ResidualPromptLearner', embeddings=dict(CONTROL, dim=dim))


@each_case('named, words', [
    (True, ['another order', "'sky' instead of 'person'", 'conv_seg.text']),
    (False, ['for 8 classes, but there are 5']),
])
def test_learner_for_other_classes(tmp_path, make_embeddings, named, words):
    """Learners are held to the dataset as fixed text is, in each loop.

    Text that knows no names is held to the number.
    """
    names = CLASSES[::-1] if named else CLASSES[:5]
    file = make_embeddings(8, names=list(CLASSES))
    text = residual(file) if named else learner(16)
    cfg = tiny_config(tmp_path, text, dict(switch_at=3))
    for loop in ('train', 'test', 'val'):
        cfg[f'{loop}_dataloader'].dataset.metainfo = dict(classes=names)
    for loop in ('train', 'test', 'val'):
        cfg.experiment_name = f'{loop}_{tmp_path.parent.name}{tmp_path.name}'
        with pytest.raises(ValueError) as error:
            getattr(Runner.from_cfg(cfg), loop)()
        for word in [*words, 'BaseSegDataset']:
            assert word in str(error.value)
    assert not list(tmp_path.glob('work/*.pth'))


@each_case('classes, said', [
    (CLASSES[::-1], "'sky' instead of 'person'"),
    ('data/classen.txt', "read from 'data/classen.txt', and there is no such"),
    (None, 'names no classes'),
])
def test_classes_of_the_validation_set_are_checked_first(
        tmp_path, make_embeddings, classes, said):
    """Not after the hours before the first validation."""
    text = residual(make_embeddings(8, names=list(CLASSES)))
    cfg = tiny_config(tmp_path, text, dict(switch_at=3), 4)
    cfg.log_level = 'WARNING'
    cfg.val_dataloader.dataset.metainfo = dict(classes=classes)
    if classes is None:
        del cfg.val_dataloader.dataset.metainfo
    with pytest.raises((ValueError, KeyError, AssertionError)) as error:
        run(cfg)
    if classes is None:  # by MMSegmentation
        logs = list(tmp_path.rglob('*.log'))
        assert said in logs[0].read_text()
    else:
        assert said in str(error.value) and 'BaseSegDataset' in str(error)
        assert not list(tmp_path.glob('work/*.pth'))


def test_bad_prompts_cost_nothing(tmp_path, monkeypatch):
    """They are looked at before stage 1, by a run that starts anew."""
    file = tmp_path / 'toy.safetensors'
    encode_classes(list(CLASSES), 'toyclip', 'photo').save(file)
    fixed = dict(type='ClassEmbeddings', file=str(file))
    text = dict(PROMPTS, init='a photo of', embeddings=fixed)
    cfg = tiny_config(tmp_path, text, dict(switch_at=2), 4, save_every=1)
    with pytest.raises(ValueError, match="'a photo of' has 3 tokens"):
        run(cfg)
    assert not list(tmp_path.glob('work/*.pth'))
    cfg.model.decode_head.text.init = 'a photo of a'
    weights = []
    for look in (True, False):
        if not look:
            monkeypatch.setattr(ContextPromptLearner, 'check_stage2',
                                lambda self: None)
        runner = run(cfg, work_dir=str(tmp_path / f'{look}'))
        weights.append(runner.model.state_dict())
    assert_equal(*weights)


@each_case('head, error, message', [
    (dict(type='TextUPerHead'), KeyError,
     'TextUPerHead is not in the mmseg::model reg'),
    (dict(type='FCNHead'), TypeError, "unexpected keyword argument 'text'"),
    (dict(text=[CONTROL, CONTROL]), TypeError,
     'must be the config of a text provider'),
    (dict(text=dict(learner(16), embeddings=learner(16))), TypeError,
     'must be the config of a fixed provider.*ResidualPromptLearner'),
])
def test_bad_heads(tmp_path, head, error, message):
    """The FAQ explains errors of MMEngine."""
    cfg = tiny_config(tmp_path, CONTROL, dict())
    for key, value in head.items():
        cfg.model.decode_head[key] = value
    with pytest.raises(error, match=message):
        run(cfg)
    faq = Path(ROOT, 'docs/en/notes/faq.md').read_text()
    assert 'text' in head or message.split(' ', 1)[1][:24] in faq


def test_two_text_fragments(tmp_path):
    """MMEngine says which keys two bases both define."""
    fragments = sorted(Path(ROOT, 'configs/_base_/text').glob('*_*.py'))
    path = tmp_path / 'config.py'
    path.write_text(f'_base_ = {[str(f) for f in fragments[:2]]}')
    with pytest.raises(
            KeyError, match="Duplicate key is not allowed.*'text_provider'"):
        Config.fromfile(path)


def test_a_checkpoint_of_another_width(tmp_path, capsys):
    """Resuming is refused; loading says what was left out."""
    cfg = tiny_config(
        tmp_path, learner(16), dict(switch_at=3), 4, save_every=2)
    run(cfg)
    work = tmp_path / 'work'
    (work / 'iter_4.pth').unlink()
    (work / 'last_checkpoint').unlink()
    path = str(work / 'iter_2.pth')
    cfg.model.decode_head.text = learner(32)
    with pytest.raises(
            ValueError, match=r'shape \(8, 32\), but.*from has \(8, 16\)'):
        run(cfg, resume=True, load_from=path)
    assert not (work / 'iter_4.pth').exists()
    capsys.readouterr()
    runner = run(cfg, load_from=path, work_dir=str(tmp_path / 'second'))
    # MMEngine's message of a partial load.
    assert ('size mismatch for decode_head.conv_seg.text.class_embeddings: '
            'copying a param with shape torch.Size([8, 16])'
            ) in capsys.readouterr().out
    assert runner.model.decode_head.text_branch.text().shape == (8, 32)
