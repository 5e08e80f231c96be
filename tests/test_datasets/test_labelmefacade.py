# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""From the published folder to samples, on generated files."""
import numpy as np
import pytest
from images import write
from mmseg.registry import DATASETS
from tool_modules import fails, load_tool

from mmseg_textkd.datasets import LabelMeFacadeDataset

TOOL = load_tool('dataset_converters/labelmefacade.py')
META = LabelMeFacadeDataset.METAINFO
NAMES = dict(train=['a__p1', 'b.c__p2'], test=['d__p3'])


def labels(seed):
    """A label map with all classes and, as 8, pixels of none."""
    labels = np.random.default_rng(seed).integers(0, 9, (6, 9))
    labels[0] = range(9)
    return labels


@pytest.fixture
def source(tmp_path):
    root = tmp_path / 'source'
    colors = np.array([*META['palette'], [0, 0, 0]], np.uint8)
    for split, names in NAMES.items():
        for name in names:
            image = np.full((6, 9, 3), len(name), np.uint8)
            write(root / f'images/{name}.jpg', image)
            write(root / f'labels/{name}.png', colors[labels(len(name))])
        (root / f'{split}.txt').write_text('\n'.join(f'images/{name}.jpg'
                                                     for name in names))
    return root


def build(root, split='train'):
    prefix = dict(img_path=f'img/{split}', seg_map_path=f'ann/{split}')
    pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
    return DATASETS.build(
        dict(
            type='LabelMeFacadeDataset',
            data_root=str(root),
            data_prefix=prefix,
            pipeline=pipeline))


def test_from_the_published_folder_to_samples(source, tmp_path, capsys):
    TOOL.main([str(source), str(tmp_path / 'out')])
    assert capsys.readouterr().out == 'train: 2 images\ntest: 1 images\n'
    for split, names in NAMES.items():
        dataset = build(tmp_path / 'out', split)
        assert dataset.metainfo['classes'][2] == 'door'
        assert len(dataset) == len(names)
        for name, sample in zip(names, dataset):
            assert sample['img_path'].endswith(f'img/{split}/{name}.jpg')
            assert (sample['img'] == len(name)).all()
            expected = labels(len(name))
            expected[expected == 8] = 255
            np.testing.assert_array_equal(sample['gt_seg_map'], expected)


def test_what_is_missing_or_wrong_is_named(source, tmp_path, capsys):
    out = tmp_path / 'out'
    TOOL.main([str(source), str(out)])
    (out / 'ann/train/a__p1.png').unlink()
    with pytest.raises(FileNotFoundError, match=r'a__p1\.png.*labelmefacade'):
        build(out)
    (out / 'img/test/d__p3.jpg').unlink()
    with pytest.raises(FileNotFoundError, match='no image'):
        build(out, 'test')
    write(source / 'labels/a__p1.png', np.full((6, 9, 3), 7, np.uint8))
    assert 'a__p1.png has colors of no class, such as [7, 7, 7]' in fails(
        TOOL, capsys, source, out)
    (source / 'train.txt').unlink()
    assert 'must be the published folder' in fails(TOOL, capsys, source, out)
