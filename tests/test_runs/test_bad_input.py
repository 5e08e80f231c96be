# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Bad input to a whole run: a clear error, in time, and no damage."""
import pickle
from pathlib import Path

import pytest
import torch
from each_case import each_case
from mmengine.config import Config
from mmengine.runner import Runner
from processes import ROOT
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import CLASSES, residual, run, tiny_config

from mmseg_textkd.text import TextEmbeddings
from mmseg_textkd.text.encode_classes import encode_classes


def tampered(path):
    """Other vectors under the old hash."""
    with safe_open(path, framework='pt') as file:
        meta, vectors = file.metadata(), file.get_tensor('vectors')
    save_file(dict(vectors=vectors.flip(0)), path, metadata=meta)


def nan(path):
    """With a hash that fits, as a careless writer would leave it."""
    record = TextEmbeddings.load(path)
    record.vectors[2] = float('nan')
    record.save(path)


def pickled(path):
    Path(path).write_bytes(pickle.dumps(dict(vectors=[[1., 0.]])))


def cut_short(path):
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[:len(data) // 2])


DAMAGES = {
    tampered: 'does not fit its SHA-256',
    nan: 'NaN or infinity in the vectors of the rows .2.',
    pickled: 'no embeddings file but .*pickle',
    cut_short: 'cut short or damaged',
}


@each_case('damage', DAMAGES)
def test_damaged_file(tmp_path, make_embeddings, damage):
    file = make_embeddings(8, names=list(CLASSES))
    damage(file)
    before = Path(file).read_bytes()
    with pytest.raises(ValueError, match=DAMAGES[damage]) as error:
        # With a width too: a file that is there is never passed over.
        run(tiny_config(tmp_path, residual(file, dim=16), dict(switch_at=3)))
    assert file in str(error.value)
    assert Path(file).read_bytes() == before
    assert not list(tmp_path.glob('work/*.pth'))


@each_case('names, words', [
    (CLASSES[::-1], ['another order', "'person' instead of 'sky'"]),
    ([*CLASSES[:-1], 'tram'], ["unexpected here: ['tram']", "'person'"]),
])
def test_learner_for_other_classes(tmp_path, make_embeddings, names, words):
    """Learners are held to the dataset as fixed text is, in each loop."""
    file = make_embeddings(8, names=list(names))
    cfg = tiny_config(tmp_path, residual(file), dict(switch_at=3))
    for loop in ('train', 'test', 'val'):
        cfg.experiment_name = f'{loop}_{tmp_path.name}'
        with pytest.raises(ValueError) as error:
            getattr(Runner.from_cfg(cfg), loop)()
        for word in [*words, 'BaseSegDataset', 'decode_head.conv_seg.text']:
            assert word in str(error.value)
    assert not list(tmp_path.glob('work/*.pth'))


def test_bad_prompts_cost_nothing_but_a_resume(tmp_path):
    """What is found at the switch can be put right from there."""
    file = tmp_path / 'toy.safetensors'
    encode_classes(list(CLASSES), 'toyclip', 'photo').save(file)
    text = dict(
        type='ContextPromptLearner',
        model='toyclip',
        token_dim=64,
        n_ctx=4,
        init='a photo of',
        embeddings=dict(type='ClassEmbeddings', file=str(file)))
    cfg = tiny_config(tmp_path, text, dict(switch_at=2), 4, save_every=1)
    with pytest.raises(ValueError, match="'a photo of' has 3 tokens"):
        run(cfg)
    assert sorted(p.name for p in tmp_path.glob('work/*.pth')) == [
        'iter_1.pth', 'iter_2.pth'
    ]
    cfg.model.decode_head.text.init = 'a photo of a'
    runner = run(cfg, resume=True)
    assert runner.iter == 4
    whole = run(cfg, work_dir=str(tmp_path / 'whole'))
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, runner.model.state_dict()[key]), key


CONTROL = dict(type='ControlEmbeddings', kind='random', dim=16)


def learner(dim):
    return dict(
        type='ResidualPromptLearner', embeddings=dict(CONTROL, dim=dim))


@each_case('kind, error, message', [
    ('TextUPerHead', KeyError, 'TextUPerHead is not in the mmseg::model reg'),
    ('FCNHead', TypeError, "unexpected keyword argument 'text'"),
])
def test_heads_without_text(tmp_path, kind, error, message):
    """Errors of MMEngine, which the FAQ explains."""
    cfg = tiny_config(tmp_path, CONTROL, dict())
    cfg.model.decode_head.type = kind
    with pytest.raises(error, match=message):
        run(cfg)
    faq = (Path(ROOT) / 'docs/en/notes/faq.md').read_text()
    assert message.split(' ', 1)[1][:24] in faq


@each_case('text, message', [
    ([CONTROL, CONTROL], 'must be the config of a text provider'),
    (dict(type='ResidualPromptLearner', embeddings=learner(16)),
     'must be the config of a fixed provider.*ResidualPromptLearner'),
])
def test_text_that_is_no_provider(tmp_path, text, message):
    with pytest.raises(TypeError, match=message):
        run(tiny_config(tmp_path, text, dict()))


def test_two_text_fragments(tmp_path):
    """MMEngine says which keys two bases both define."""
    fragments = sorted(Path(ROOT, 'configs/_base_/text').glob('*_*.py'))
    path = tmp_path / 'config.py'
    path.write_text(f'_base_ = {[str(f) for f in fragments[:2]]}')
    with pytest.raises(
            KeyError, match="Duplicate key is not allowed.*'text_provider'"):
        Config.fromfile(path)


@each_case('loop', ['train', 'val', 'test'])
def test_another_number_of_classes(tmp_path, loop):
    """Text that knows no names is held to the number."""
    cfg = tiny_config(tmp_path, learner(16), dict(switch_at=3))
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=CLASSES[:5])
    cfg.experiment_name = f'{loop}_{tmp_path.name}'
    runner = Runner.from_cfg(cfg)
    with pytest.raises(
            ValueError, match='for 8 classes, but there are 5 in BaseSegData'):
        getattr(runner, loop)()
    assert not list(tmp_path.glob('work/*.pth'))


def test_a_checkpoint_of_another_width(tmp_path, capsys):
    """Resuming is refused; loading says what was left out."""
    cfg = tiny_config(
        tmp_path, learner(16), dict(switch_at=3), 4, save_every=2)
    run(cfg)
    (tmp_path / 'work' / 'iter_4.pth').unlink()
    (tmp_path / 'work' / 'last_checkpoint').unlink()
    path = str(tmp_path / 'work' / 'iter_2.pth')
    cfg.model.decode_head.text = learner(32)
    with pytest.raises(
            ValueError, match=r'shape \(8, 32\), but.*from has \(8, 16\)'):
        run(cfg, resume=True, load_from=path)
    assert not (tmp_path / 'work' / 'iter_4.pth').exists()
    capsys.readouterr()
    runner = run(cfg, load_from=path, work_dir=str(tmp_path / 'second'))
    # MMEngine's message of a partial load.
    assert ('size mismatch for decode_head.conv_seg.text.class_embeddings: '
            'copying a param with shape torch.Size([8, 16])'
            ) in capsys.readouterr().out
    assert runner.model.decode_head.text_branch.text().shape == (8, 32)


def test_a_stock_checkpoint_is_not_resumed(tmp_path):
    cfg = tiny_config(tmp_path, None, max_iters=2)
    run(cfg)
    text = tiny_config(tmp_path, learner(16), dict(switch_at=3), max_iters=4)
    with pytest.raises(ValueError, match='resume from has none.*load_from'):
        run(text, resume=True)
