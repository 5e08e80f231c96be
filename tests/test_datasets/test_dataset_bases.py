# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Dataset bases on small trees that lie where the guide says, for real."""
import re
from pathlib import Path
from typing import NamedTuple, Tuple

import numpy as np
import pytest
import torch
from each_case import each_case
from images import noise, write
from mmengine.config import Config
from mmseg.registry import DATASETS
from network_tester import CONFIGS

from mmseg_textkd import stock_config
from mmseg_textkd.text import Vocabulary

pytestmark = pytest.mark.stacks

BASES = CONFIGS / '_base_/datasets'
HEIGHT, WIDTH = 40, 60


class Layout(NamedTuple):
    """What the files of a dataset are like."""
    kind: str  # Dataset class
    vocabulary: str  # its key
    stock: str  # stock config that the base inherits from
    # Folder and file name; the fields are the part and the stem.
    images: str
    labels: str
    values: Tuple[int, ...]  # labels in the files
    meant: Tuple[int, ...]  # what they are in training and testing
    scale: float  # from a file's size to that in testing
    parts: Tuple[str, str] = ('train', 'val')  # their names


VOC = 'data/VOCdevkit/VOC2012'
ADE = 'data/ade/ADEChallengeData2016'
PARTS = ('training', 'validation')
LAYOUTS = {
    'cityscapes-1024x1024':
    Layout('CityscapesDataset', 'cityscapes', 'cityscapes_1024x1024.py',
           'data/cityscapes/leftImg8bit/{}/town/{}_leftImg8bit.png',
           'data/cityscapes/gtFine/{}/town/{}_gtFine_labelTrainIds.png',
           (0, 7, 18, 255), (0, 7, 18, 255), 25.6),
    # Label 0 is none of the classes; they start at 1.
    'ade20k-512x512':
    Layout('ADE20KDataset', 'ade20k', 'ade20k.py', ADE + '/images/{}/{}.jpg',
           ADE + '/annotations/{}/{}.png', (0, 1, 75, 150), (255, 0, 74, 149),
           12.8, PARTS),
    'voc12aug-512x512':
    Layout('PascalVOCDataset', 'voc12', 'pascal_voc12_aug.py',
           VOC + '/JPEGImages/{1}.jpg', VOC + '/SegmentationClass/{1}.png',
           (0, 15, 20, 255), (0, 15, 20, 255), 12.8),
    'coco-stuff164k-512x512':
    Layout('COCOStuffDataset', 'coco_stuff', 'coco-stuff164k.py',
           'data/coco_stuff164k/images/{}2017/{}.jpg',
           'data/coco_stuff164k/annotations/{}2017/{}_labelTrainIds.png',
           (0, 80, 170, 255), (0, 80, 170, 255), 12.8),
    'bdd100k-512x1024':
    Layout('BDD100KDataset', 'bdd100k', 'bdd100k.py',
           'data/bdd100k/images/10k/{}/{}.jpg',
           'data/bdd100k/labels/sem_seg/masks/{}/{}.png', (0, 7, 18, 255),
           (0, 7, 18, 255), 25.6),
    # Label 65 of the files is `Unlabeled`.
    'mapillary-v1-512x1024':
    Layout('MapillaryDataset_v1', 'mapillary_v1', 'mapillary_v1_65.py',
           'data/mapillary/{}/images/{}.jpg',
           'data/mapillary/{}/v1.2/labels/{}.png', (0, 30, 64, 65),
           (0, 30, 64, 255), 25.6, PARTS)
}


def stripes(values):
    """Diagonal stripes, so narrow that every crop holds every value."""
    rows, cols = np.mgrid[:HEIGHT, :WIDTH] // 4
    return np.array(values, np.uint8)[(rows + cols) % len(values)]


def write_pair(image, label, values):
    write(image, noise(HEIGHT, WIDTH))
    # With a palette, as VOC and Mapillary have them: what counts is the index
    # and not the color.
    write(label, stripes(values), noise(1, 256))


@pytest.fixture(params=LAYOUTS)
def base(request, tmp_path, monkeypatch):
    """A base, and two images of either part where it looks for them."""
    layout = LAYOUTS[request.param]
    for split, part in zip(('train', 'val'), layout.parts):
        for name in (f'{split}0', f'{split}1'):
            write_pair(tmp_path / layout.images.format(part, name),
                       tmp_path / layout.labels.format(part, name),
                       layout.values)
    if layout.vocabulary == 'voc12':
        write_pair(tmp_path / VOC / 'JPEGImages/aug0.jpg',
                   tmp_path / VOC / 'SegmentationClassAug/aug0.png',
                   layout.values)
        lists = tmp_path / VOC / 'ImageSets/Segmentation'
        lists.mkdir(parents=True)
        for split, names in (('train', 'train0 train1'), ('val', 'val0 val1'),
                             ('aug', 'aug0')):
            (lists / f'{split}.txt').write_text(names.replace(' ', '\n'))
    monkeypatch.chdir(tmp_path)
    return layout, Config.fromfile(BASES / f'{request.param}.py')


def test_every_base_is_tested():
    found = {file.stem for file in BASES.glob('*.py')}
    # Variants, episodes and several together have tests of their own.
    others = 'camvid|toy_scenes|steps|episodes|labelmefacade|coarse-fine'
    assert {n for n in found if not re.search(others, n)} == set(LAYOUTS)


@each_case('name', LAYOUTS)
def test_is_the_stock_one_with_the_crop_of_its_name(name):
    cfg = Config.fromfile(BASES / f'{name}.py')
    stock = stock_config(f'_base_/datasets/{LAYOUTS[name].stock}')
    assert cfg.to_dict() == Config.fromfile(stock).to_dict()
    height, width = map(int, name.rsplit('-', 1)[1].split('x'))
    crops = [t for t in cfg.train_pipeline if t.type == 'RandomCrop']
    assert [tuple(t.crop_size) for t in crops] == [(height, width)]
    assert tuple(cfg.crop_size) == (height, width)


def load_all(dataloader):
    dataset = DATASETS.build(dataloader.dataset)
    samples = [dataset[i] for i in range(len(dataset))]
    return dataset, [(s['inputs'], s['data_samples']) for s in samples]


def stem(sample):
    """Name of a sample's image without what the dataset appends."""
    return Path(sample.img_path).stem.split('_')[0]


def test_training_samples(base):
    layout, cfg = base
    dataset, samples = load_all(cfg.train_dataloader)
    voc = layout.vocabulary == 'voc12'
    kinds = {type(d).__name__ for d in getattr(dataset, 'datasets', [dataset])}
    assert kinds == {layout.kind}
    assert dataset.metainfo['classes'] == Vocabulary.from_spec(
        layout.vocabulary).names
    assert len(dataset.metainfo['palette']) == len(dataset.metainfo['classes'])
    # All of the training part, with VOC's augmentation, and of no other.
    expected = {'train0', 'train1'} | ({'aug0'} if voc else set())
    assert {stem(sample) for _, sample in samples} == expected
    for image, sample in samples:
        seg_map = sample.gt_sem_seg.data
        assert image.dtype == torch.uint8 and image.shape[0] == 3
        assert image.shape[1:] == seg_map.shape[1:]
        assert all(a <= b for a, b in zip(image.shape[1:], cfg.crop_size))
        assert set(seg_map.unique().tolist()) == {*layout.meant}


def test_test_samples(base):
    layout, cfg = base
    dataset, samples = load_all(cfg.test_dataloader)
    assert cfg.val_dataloader == cfg.test_dataloader
    names = Vocabulary.from_spec(layout.vocabulary).names
    assert dataset.metainfo['classes'] == names
    assert [stem(sample) for _, sample in samples] == ['val0', 'val1']
    expected = torch.from_numpy(stripes(layout.meant))
    for image, sample in samples:
        assert image.shape == (3, round(HEIGHT * layout.scale),
                               round(WIDTH * layout.scale))
        # The label map is that of the file: scores are for its size.
        assert sample.ori_shape == (HEIGHT, WIDTH)
        assert torch.equal(sample.gt_sem_seg.data[0].long(), expected.long())
