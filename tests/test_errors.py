# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Each error says where it is and what to do: a table of bad input."""
import argparse
import runpy

import cv2
import numpy as np
import pytest
import torch
import yaml
from each_case import each_case
from mmseg.registry import TRANSFORMS
from processes import ROOT

from mmseg_textkd.study import Ledger, Study
from mmseg_textkd.text import Vocabulary
from mmseg_textkd.text.vector_import import read_names
from mmseg_textkd.utils.arguments import read_config
from mmseg_textkd.utils.checkpoint import read_checkpoint

STUDY = dict(
    name='s',
    baseline='a',
    evaluate=['val'],
    networks=dict(
        n=dict(configs=dict(c='c.py'), iterations=2, val_interval=1)),
    arms=dict(a=dict(config='c')),
    grids=[dict(networks=['n'], arms=['a'], seeds=[0])])


def text(data):
    return lambda path: path.write_bytes(data)


def study(**changes):
    return text(yaml.safe_dump({**STUDY, **changes}).encode())


def network(**changes):
    return study(networks=dict(n={**STUDY['networks']['n'], **changes}))


def seeds(value):
    return study(grids=[dict(STUDY['grids'][0], seeds=value)])


def foreign(path):
    torch.save(
        dict(state_dict=dict(a=torch.zeros(1)), meta=argparse.Namespace()),
        path)


def load_image(path):
    TRANSFORMS.build(dict(type='LoadImageFromFile'))(dict(img_path=str(path)))


def load_labels(path):
    TRANSFORMS.build(dict(type='LoadAnnotations'))(
        dict(
            img_path='',
            seg_map_path=str(path),
            seg_fields=[],
            reduce_zero_label=False))


# Name of the file, what is in it, who reads it, and what is said.
BAD = [
    ('n.txt', text('fl\xfc\xdfe'.encode('latin-1')), Vocabulary.from_spec,
     'n.txt: it is not UTF-8.*iconv'),
    ('n.txt', text('road\nsky'.encode('utf-16')), Vocabulary.from_spec,
     'n.txt: it is not UTF-8.*UTF-16'),
    ('n.json', text(b'[1, 2]'), Vocabulary.from_spec, 'n.json.*1'),
    ('n.json', text(b'{"road": {"a": "b"}}'), Vocabulary.from_spec,
     "n.json: Class 'road': expected a phrase or a list of phrases"),
    ('n.json', text(b'["a\\nb", "c"]'), Vocabulary.from_spec,
     r'n.json.*a\\nb.*line break'),
    ('n.json', text(b'[[["road"]]]'), read_names, 'n.json: name 0 is no text'),
    ('c.py', text(b'model = dict('), read_config, 'c.py.*print_config'),
    ('c.py', text(b"_base_ = './c.py'"), read_config, 'c.py.*Recursion'),
    ('c.py', text(b'a = 1'), read_config, 'c.py has no network.*inherits'),
    ('l.jsonl', text(b'\xff\xfe\x00'), Ledger, 'l.jsonl.*JSON lines in UTF-8'),
    ('s.yaml', text(b"_base_: s.yaml\nname: s"), Study.load,
     's.yaml is its own `_base_`.*Name another'),
    ('s.yaml', text(b'\xff\xfe\x00'), Study.load, 's.yaml.*YAML in UTF-8'),
    ('s.yaml', seeds(['a']), Study.load, r's.yaml: grid 1: seeds.*\[0, 1, 2]'),
    ('s.yaml', network(val_interval=0), Study.load,
     "s.yaml: network 'n': val_interval must be .* at least 1"),
    ('s.yaml', network(iterations='x'), Study.load, "'n': iterations must be"),
    ('s.yaml', study(name='../s'), Study.load, 's.yaml: name must be of let'),
    ('w.pth', foreign, read_checkpoint, 'w.pth.*Namespace.*not run'),
    ('i.png', text(b''), load_image,
     'i.png cannot be read as an image.*empty'),
    ('l.png', text(b'\x89PNG junk'), load_labels,
     'l.png cannot be read as a label map.*another kind'),
]


@each_case('name, write, read, said', BAD)
def test_bad_files(tmp_path, name, write, read, said):
    path = tmp_path / name
    write(path)
    with pytest.raises(Exception, match=f'(?s){said}') as error:
        read(path)
    assert isinstance(error.value, ValueError)
    # Nobody is told to read it all the same.
    assert 'weights_only' not in str(error.value)


def test_a_camera_has_no_negative_number(capsys):
    tool = runpy.run_path(f'{ROOT}/demo/image_demo.py')
    with pytest.raises(SystemExit):
        tool['parse_args'](
            ['c.py', 'w.pth', '--webcam', '-5', '--out', 'x.mp4'])
    assert '--webcam must be' in capsys.readouterr().err


def test_good_files_pass(tmp_path):
    """The table's own good twins, so that it tests what it says."""
    study()(tmp_path / 's.yaml')
    assert Study.load(tmp_path / 's.yaml').name == 's'
    cv2.imwrite(str(tmp_path / 'a.png'), np.zeros((2, 2), np.uint8))
    load_image(tmp_path / 'a.png')
    load_labels(tmp_path / 'a.png')
