# Copyright (c) mmseg_textkd contributors. All rights reserved.
from mmengine.config import Config

from mmseg_textkd.utils.config import (as_list, dicts, first_dataset,
                                       type_name, walk)


def test_walk_meets_everything_once_from_outside_in():
    inner = dict(type='mmseg.C')
    cfg = dict(a=[[inner], (dict(b=1), )], c=dict(d='text'), e=None)
    assert list(walk(cfg)) == [
        cfg, cfg['a'], [inner], inner, cfg['a'][1],
        dict(b=1), cfg['c']
    ]
    assert [type_name(d) for d in dicts(cfg)] == ['', 'C', '', '']
    assert type_name(dict(type=Config)) == 'Config'
    for part in dicts(cfg):
        part['seen'] = True
    assert inner['seen'] and cfg['c'] == dict(d='text', seen=True)


def test_one_or_several_or_none():
    assert as_list(None) == as_list(()) == []
    assert as_list(cfg := dict(type='A')) == as_list((cfg, )) == [cfg]


def test_first_dataset_of_wrappers_and_of_none():
    first = dict(type='First')
    several = dict(type='Concat', datasets=[first, dict(type='Second')])
    loader = dict(dataset=dict(type='Repeat', dataset=several))
    cfg = Config(dict(test_dataloader=loader, val_dataloader=None))
    assert first_dataset(cfg) == first
    assert first_dataset(cfg, 'val') == first_dataset(cfg, 'train') == {}
