# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Embeddings files that are missing when MMSegmentation's tool trains."""
import copy

import pytest
from each_case import each_case
from tiny import CLASSES, PROMPTS, assert_equal, run, tiny_config

from mmseg_textkd.text.encode_classes import ensure_embeddings

HOOK = dict(switch_at=3)


def text(kind, file):
    """Each kind of text that is read from a file."""
    build = dict(model='toyclip', templates='photo', keep_bank=True)
    build['vocabulary'] = list(CLASSES)
    embeddings = dict(type='ClassEmbeddings', file=str(file), dim=64)
    embeddings['build'] = build
    if kind == 'synonyms':
        embeddings['type'] = 'SynonymSampler'
    if kind in ('synonyms', 'mixture'):
        build['vocabulary'] = {n: [n, f'big {n}'] for n in CLASSES}
    if kind == 'centered':
        embeddings['center'] = True
    learners = dict(
        context=dict(PROMPTS, vocabulary=list(CLASSES)),
        centered=dict(type='ResidualPromptLearner'),
        mixture=dict(type='MixturePromptLearner'))
    if kind not in learners:
        return embeddings
    return dict(learners[kind], embeddings=embeddings)


@each_case('kind, average', [('fixed', False), ('context', True),
                             ('centered', False), ('synonyms', False)])
def test_a_missing_file_is_made_and_nothing_else_changes(
        tmp_path, kind, average):
    """Both stages end as with the file there from the start."""
    states = []
    for place in ('made', 'there'):
        cfg = tiny_config(tmp_path, text(kind, tmp_path / f'{place}.st'),
                          dict() if kind in ('fixed', 'synonyms') else HOOK)
        cfg.work_dir = str(tmp_path / place)
        if average:
            cfg.custom_hooks.append(dict(type='EMAHook', momentum=.3))
        if place == 'there':
            ensure_embeddings(copy.deepcopy(cfg))
        states.append(run(cfg).model.state_dict())
        assert (tmp_path / f'{place}.st').is_file()
    assert_equal(*map(dict, states))


@each_case('kind', ['centered', 'mixture'])
def test_a_missing_file_is_made_beside_loaded_weights(tmp_path, kind):
    """They fill the text, but the run is to have that of its config."""
    first = text(kind, tmp_path / 'first.st')
    ensure_embeddings(tiny_config(tmp_path, first))
    cfg = tiny_config(tmp_path, first, HOOK)
    run(cfg)
    cfg.load_from = f'{cfg.work_dir}/iter_6.pth'
    ends = []
    for place in ('made', 'there'):
        file = tmp_path / f'{place}.st'
        cfg.model.decode_head.text = text(kind, file)
        cfg.model.decode_head.text.embeddings.build.templates = 'none'
        cfg.work_dir = str(tmp_path / place)
        if place == 'there':
            ensure_embeddings(copy.deepcopy(cfg))
        ends.append(dict(run(cfg).model.state_dict()))
        assert file.is_file()
    assert_equal(*ends)


def test_a_file_that_sizes_weights_wants_a_new_run(tmp_path):
    """It is made, but how many phrases it has came too late."""
    file = tmp_path / 'made.st'
    cfg = tiny_config(tmp_path, text('mixture', file), HOOK)
    with pytest.raises(ValueError, match='MixturePromptLearner.*start.*again'):
        run(cfg)
    assert file.is_file()
    run(cfg)
