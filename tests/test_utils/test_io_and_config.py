# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Files, whole or not at all, ours or not touched; parts of configs."""
import os
import struct
import zlib

import cv2
import numpy as np
import pytest
import torch
from each_case import each_case
from mmengine.config import Config

from mmseg_textkd.utils.config import (as_list, dicts, first_dataset,
                                       type_name, walk)
from mmseg_textkd.utils.io import (DamagedFileError, check_image, make_folder,
                                   read_hashed, read_image, remove_folder,
                                   write_files, write_hashed)

VECTORS = dict(vectors=torch.arange(4096.).view(64, 64))


def test_all_files_or_none(tmp_path):
    a, b = tmp_path / 'new' / 'a', tmp_path / 'b'
    write_files({a: b'1', b: b'2'})
    assert (a.read_bytes(), b.read_bytes()) == (b'1', b'2')
    mask = os.umask(0)
    os.umask(mask)
    assert a.stat().st_mode & 0o777 == 0o666 & ~mask
    (tmp_path / 'file').write_bytes(b'')
    with pytest.raises(OSError):
        write_files({a: b'3', tmp_path / 'file' / 'c': b'4'})
    assert a.read_bytes() == b'1'
    assert not [p for p in tmp_path.rglob('*') if p.suffix == '.tmp']


def test_what_was_verified_stays_as_it_was(tmp_path):
    path = tmp_path / 'file.safetensors'
    write_hashed(path, 'k', VECTORS, dict(a='b'))
    tensors, texts = read_hashed(path, 'k')
    # As `cp` does it: the same file with other bytes, and shorter.
    with open(path, 'r+b') as file:
        file.write(bytes(path.stat().st_size))
        file.truncate(100)
    assert tensors['vectors'].equal(VECTORS['vectors'])
    assert texts == dict(a='b')


@each_case('change', ['kind', 'text', 'bit', 'cut'])
def test_changed_files_are_refused(tmp_path, change):
    path = tmp_path / 'file.safetensors'
    write_hashed(path, 'kind.1', VECTORS, dict(a='bcd'))
    data = path.read_bytes()
    changed = dict(text=data.replace(b'bcd', b'bce'), cut=data[:-1])
    changed['bit'] = data[:-1] + bytes([data[-1] ^ 1])
    path.write_bytes(changed.get(change, data))
    with pytest.raises(DamagedFileError):
        read_hashed(path, 'kind.2' if change == 'kind' else 'kind.1')


def test_only_folders_of_ours_are_removed(tmp_path):
    ours, theirs = tmp_path / 'ours', tmp_path / 'theirs'
    make_folder(ours)
    (ours / 'a').mkdir()
    make_folder(ours)
    assert not (ours / 'a').exists()
    theirs.mkdir()
    make_folder(theirs)  # empty: nothing is lost
    remove_folder(theirs)
    theirs.mkdir()
    (theirs / 'data').write_text('1')
    (tmp_path / 'link').symlink_to(ours)
    for path in (theirs, theirs / 'data', tmp_path / 'link'):
        for function in (make_folder, remove_folder):
            with pytest.raises(FileExistsError, match='nothing was removed'):
                function(path)
    assert (theirs / 'data').read_text() == '1' and ours.is_dir()


def write_huge_png(path, side):
    """Write the head of a PNG of that many pixels a side, in few bytes."""

    def chunk(kind, data):
        crc = struct.pack('>I', zlib.crc32(kind + data))
        return struct.pack('>I', len(data)) + kind + data + crc

    head = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) +
                     chunk(b'IDAT', zlib.compress(b'\0')) +
                     chunk(b'IEND', b''))


def test_images_are_bounded_by_their_header(tmp_path):
    path = tmp_path / 'huge.png'
    write_huge_png(path, 100_000)  # 30 GB, if it were decoded
    with pytest.raises(ValueError, match='100000 x 100000.*max-pixels'):
        read_image(path)
    check_image(path, max_pixels=10**10)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'ö.png'), pixels)
    assert (read_image(tmp_path / 'ö.png', 600) == pixels).all()
    with pytest.raises(ValueError, match='30 x 20 = 600 pixels'):
        read_image(tmp_path / 'ö.png', 599)
    (tmp_path / 'text.png').write_text('no image')
    with pytest.raises(ValueError, match='text.png cannot be read'):
        read_image(tmp_path / 'text.png')
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / 'none.png')


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
    assert first_dataset({}) == {}
