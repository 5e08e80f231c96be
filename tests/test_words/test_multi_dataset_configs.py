# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The shipped configs of several data sets."""
import re

from mmseg.registry import DATASETS, MODELS
from network_tester import CONFIGS, load_config

from mmseg_textkd.datasets.label_spaces import all_words
from mmseg_textkd.deploy import to_stock_cfg
from mmseg_textkd.deploy.words import to_words_cfg
from mmseg_textkd.study import Study
from mmseg_textkd.study.analysis import Group, check_hypotheses
from mmseg_textkd.text import Vocabulary

FOLDER = CONFIGS / 'multi_dataset'


def words_of(dataset):
    """The words of each data set of a config."""
    renamed, lists = dataset.get('words') or {}, []
    for name, part in zip(dataset.names, dataset.datasets, strict=True):
        own = renamed.get(name, {})
        classes = DATASETS.get(part.type).METAINFO['classes']
        lists.append([own.get(label, label) for label in classes])
    return lists


def test_data_sets_text_and_heads_have_the_same_words():
    paths = sorted(FOLDER.glob('textkd_*.py'))
    assert len(paths) == 3
    for path in paths:
        cfg = load_config(path)
        dataset, head = cfg.train_dataloader.dataset, cfg.model.decode_head
        lists = words_of(dataset)
        words = all_words(lists)
        heads = [head, *cfg.model.get('auxiliary_head', [])]
        assert {head.num_classes for head in heads} == {len(words)}, path
        text = head.text.embeddings
        names = [Vocabulary.from_spec(b.vocabulary).names for b in text.build]
        assert [*map(set, names)] == [*map(set, lists)], path
        assert all_words(names) == words and len(text.file) == len(lists), path
        for split in ('val', 'test'):
            assert words_of(cfg[f'{split}_dataloader'].dataset) == lists
            metrics = cfg[f'{split}_evaluator']
            assert [metric.dataset for metric in metrics] == dataset.names
        # All that the twin, with one softmax, has otherwise.
        name = re.sub('^textkd_|_vit-b16|_toyclip', '', path.name)
        twin = load_config(path.with_name(name))
        assert twin.model.type == 'EncoderDecoder'
        assert twin.train_dataloader == cfg.train_dataloader
        first, second = (
            to_stock_cfg(to_words_cfg(c, words)).to_dict()
            for c in (cfg, twin))
        assert first == second
        assert first['model']['decode_head']['num_classes'] == len(words)
        if 'toyclip' in path.name:  # it builds without files
            model = MODELS.build(cfg.model)
            assert model.decode_head.text_branch.text.num_classes == 9


def test_the_study_can_be_run():
    study = Study.load(CONFIGS / 'studies' / 'two_datasets.yaml')
    runs = study.runs()
    assert len(runs) == 18
    iterations = {run.arm: study.iterations(run) for run in runs}
    assert iterations['words'] == iterations['stock'] == (
        iterations['words-camvid'] + iterations['words-labelmefacade'])
    cfg = study.config(runs[3])
    assert runs[3].arm == 'words-camvid'
    assert cfg.train_dataloader.sampler.weights == dict(
        camvid=1, labelmefacade=0)
    assert cfg.train_dataloader.dataset.datasets[0].data_root == 'data/camvid'


def test_hypotheses_about_one_data_set():
    """`b` is better on `x` by 2 and 4 points, and worse on `y`."""
    entries = []
    for arm, seed, gain in (('a', 0, 0), ('b', 0, 2), ('a', 1, 1), ('b', 1,
                                                                    5)):
        datasets = dict(x=dict(mIoU=10. + gain), y=dict(mIoU=9. - gain))
        val = dict(mIoU=0., datasets=datasets)
        entries.append(dict(arm=arm, seed=seed, classes=[], val=val))
    (on_x, on_y), = check_hypotheses([Group(entries, 'val')],
                                     [['b', 'a', 'x'], ['b', 'a', 'y']])
    assert (on_x.dataset, on_y.dataset) == ('x', 'y')
    assert on_x.difference.mean == 3 and on_y.difference.mean == -3
    assert on_x.difference.number == 2
