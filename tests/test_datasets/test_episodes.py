# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Episodes of few-shot work: which ones, and their labels."""
import pickle
from collections import Counter

import numpy as np
import pytest
from each_case import each_case
from images import noise, write
from mmseg.datasets import COCOStuffDataset, PascalVOCDataset
from mmseg.registry import DATASETS, TRANSFORMS
from network_tester import CONFIGS, load_config
from PIL import Image

from mmseg_textkd.datasets import (COCO20iEpisodes, FSS1000Episodes,
                                   PASCAL5iEpisodes)

pytestmark = pytest.mark.stacks

PREFIX = dict(img_path='img', seg_map_path='ann')


def write_coco(folder):
    """The list of fold 0."""
    names = {k: [] for k in range(80)}
    for k in range(0, 80, 4):
        names[k] = [f'val2014/{k}_{i}.jpg' for i in range(3 + k % 5)]
    (folder / 'fold0.pkl').write_bytes(pickle.dumps(names, 3))
    return names


def build(kind, folder, **options):
    suffix = 'txt' if kind is PASCAL5iEpisodes else 'pkl'
    return kind(
        ann_file=str(folder / f'fold{{fold}}.{suffix}'),
        data_prefix=PREFIX,
        serialize_data=False,
        **options)


def coco(folder, **options):
    return build(COCO20iEpisodes, folder, num_episodes=200, **options)


@each_case('shot', [0, 2])
def test_coco_draws_as_the_literature_does(tmp_path, shot):
    """numpy's global generator from its seed on: class, query, supports."""
    pictures, ids = write_coco(tmp_path), list(range(0, 80, 4))
    state = np.random.get_state()
    np.random.seed(0)
    expected = []
    for _ in range(200):
        k = np.random.choice(ids, 1, replace=False)[0]
        query = np.random.choice(pictures[k], 1, replace=False)[0]
        support = []
        while len(support) < shot:
            name = np.random.choice(pictures[k], 1, replace=False)[0]
            support += [name] * (name != query)
        expected.append(
            (k, f'img/{query}', f'ann/{query.replace(".jpg", ".png")}'))
    np.random.set_state(state)
    found = coco(tmp_path, shot=shot)
    assert expected == [(e['class_id'], e['img_path'], e['seg_map_path'])
                        for e in found.data_list]
    assert found.metainfo['class_ids'] == ids
    names = COCOStuffDataset.METAINFO['classes']
    assert found.metainfo['classes'] == ('others', *names[:80])
    # The generator of the process is left alone.
    assert np.array_equal(np.random.get_state()[1], state[1])
    other = coco(tmp_path, shot=shot, seed=1).data_list
    assert [e['img_path'] for e in other] != [e[1] for e in expected]


class Harmful:

    def __reduce__(self):
        return print, ('imported', )


@each_case('content, fault', [
    (Harmful(), 'imports builtins.print'),
    ([1, 2], 'no list of file names by class'),
    (dict.fromkeys(range(1, 80, 4), ['a.jpg', 'b.jpg']),
     'no .* of class 0; it may be the list of another fold'),
])
def test_a_list_that_is_none_of_coco(tmp_path, content, fault, capsys):
    (tmp_path / 'fold0.pkl').write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=fault):
        coco(tmp_path)
    assert 'imported' not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match='juhongm999/hsnet'):
        coco(tmp_path, fold=1)
    with pytest.raises(ValueError, match='0, 1, 2 or 3, but got 4'):
        coco(tmp_path, fold=4)


def test_pascal_goes_round_its_list(tmp_path):
    file = tmp_path / 'fold1.txt'
    file.write_text('2007_01__06\n2007_01__10\n2008_02__08\n')
    found = build(PASCAL5iEpisodes, tmp_path, fold=1)
    assert len(found) == 1000
    keys = ('img_path', 'class_id', 'foreground')
    counts = Counter(tuple(e[k] for k in keys) for e in found.data_list)
    assert counts == {
        ('img/2007_01.jpg', 5, 6): 334,
        ('img/2007_01.jpg', 9, 10): 333,
        ('img/2008_02.jpg', 7, 8): 333
    }
    assert found.metainfo['class_ids'] == [5, 6, 7, 8, 9]
    names = PascalVOCDataset.METAINFO['classes']
    assert found.metainfo['classes'] == ('others', *names[1:])
    file.write_text('a__06\na__05\n')
    with pytest.raises(ValueError, match="'a__05'.*list of another fold"):
        build(PASCAL5iEpisodes, tmp_path, fold=1)


def test_fss_has_ten_pictures_of_a_class(tmp_path):
    names = FSS1000Episodes.METAINFO['classes'][1:]
    assert len(set(names)) == 1000
    for part in (names[:520], names[520:760], names[760:]):
        assert list(part) == sorted(part)
    for name in names[760:]:
        (tmp_path / name).mkdir()

    def build(**options):
        return FSS1000Episodes(
            data_root=str(tmp_path), serialize_data=False, **options)

    found = build()
    assert len(found) == 2400 and len(build(shot=1)) == 2160
    assert found.metainfo['class_ids'] == list(range(760, 1000))
    # In the order of the file names; the first is HSNet's support.
    first, one_shot = ([e['img_path'].rsplit('/', 1)[1] for e in d.data_list]
                       for d in (found, build(shot=1)))
    assert first[:3] == ['1.jpg', '10.jpg', '2.jpg']
    assert '1.jpg' not in one_shot
    last = str(tmp_path / names[-1] / '9.png')
    assert found.data_list[-1]['seg_map_path'] == last
    with pytest.raises(FileNotFoundError, match='520 of 520 folders'):
        build(split='train')
    with pytest.raises(ValueError, match="'train', 'val', 'test'"):
        build(split='trn')


LABELS = np.array([[7, 3, 255], [7, 7, 0]], np.uint8)
TWICE = np.array([[1, 0, 255], [1, 1, 0]]).repeat(2, 0).repeat(2, 1)


# COCO-20i has no pixels that are not scored. Of a smaller one the pixel counts
# that a place begins in.
@each_case('labels, size, foreground, ignored, expected', [
    (LABELS, (4, 6), 7, 255, TWICE),
    (LABELS, (4, 6), 7, None, TWICE % 255),
    (LABELS, (1, 2), 7, 255, [[1, 0]]),
])
def test_labels_are_of_the_class_at_the_size_of_the_input(
        labels, size, foreground, ignored, expected):
    transform = TRANSFORMS.build(dict(type='EpisodeLabels'))
    sample = dict(gt_seg_map=labels, img_shape=size, class_id=6)
    mine = transform(dict(sample, foreground=foreground, ignored=ignored))
    np.testing.assert_array_equal(mine['gt_seg_map'], expected)
    assert mine['ori_shape'] == size


def test_masks_are_read_as_gray(tmp_path):
    """However they are stored, as HSNet reads those of FSS-1000."""
    gray = np.array([[127, 128, 255, 0]], np.uint8)
    colors = Image.fromarray(gray[..., None].repeat(3, 2))
    odd = Image.fromarray(np.array([[(255, 120, 0), (0, 120, 255)]], np.uint8))
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), 'P')
    palette.putpalette([0, 0, 0, 255, 255, 255])
    load = TRANSFORMS.build(
        dict(type='LoadAnnotations', imdecode_backend='pillow'))
    convert = TRANSFORMS.build(dict(type='EpisodeLabels'))
    for image, expected in ((Image.fromarray(gray), [[0, 1, 1, 0]]),
                            (colors, [[0, 1, 1,
                                       0]]), (odd, [[1,
                                                     0]]), (palette, [[0, 1]]),
                            (colors.convert('1', dither=0), [[0, 1, 1, 0]])):
        image.save(tmp_path / 'a.png')
        size = np.shape(expected)
        found = convert(
            load(
                dict(
                    seg_map_path=str(tmp_path / 'a.png'),
                    seg_fields=[],
                    label_map=None,
                    reduce_zero_label=False,
                    img_shape=size,
                    class_id=0,
                    foreground=None,
                    ignored=None)))
        np.testing.assert_array_equal(found['gt_seg_map'], expected)


def test_pipeline_reads_pictures_as_torchvision_does(tmp_path):
    """Whole: what the config makes of an image and its label map."""
    labels = np.random.default_rng(0).integers(5, 8, (60, 90), np.uint8)
    write(tmp_path / 'img/a.jpg', noise(60, 90))
    write(tmp_path / 'ann/a.png', labels)
    (tmp_path / 'fold1.txt').write_text('a__06\n')
    path = 'lseg/lseg_dpt_r101_vit-b32_pascal-5i-episodes-480x480.py'
    dataset = load_config(CONFIGS / path).test_dataloader.dataset
    dataset.update(
        fold=1,
        data_root=str(tmp_path),
        ann_file='fold{fold}.txt',
        data_prefix=PREFIX,
        num_episodes=2)
    data = DATASETS.build(dataset)[1]
    with Image.open(tmp_path / 'img/a.jpg') as file:
        expected = file.convert('RGB').resize((480, 480), Image.BILINEAR)
    assert np.array_equal(data['inputs'].numpy()[::-1].transpose(1, 2, 0),
                          np.array(expected))
    sample, places = data['data_samples'], np.arange(480)
    assert sample.class_id == 5 and sample.ori_shape == (480, 480)
    expected = labels[places * 60 // 480][:, places * 90 // 480] == 6
    assert np.array_equal(sample.gt_sem_seg.data[0].numpy(), expected)
