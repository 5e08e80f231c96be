# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""tools/stock_tool.py: MMSegmentation's tools on a config of ours."""
import shutil
from collections import OrderedDict

import cv2
import numpy as np
import pytest
import torch
from each_case import each_case
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer
from tool_modules import ROOT, load_tool

from mmseg_textkd.datasets.toy_scenes_generator import generate_toy_scenes

CONFIG = str(ROOT / 'configs/text_classifier' /
             'textkd_bisenetv2_fcn_toyclip_1xb8-200i_toy-scenes-128x256.py')


class Samples(list):
    """A list that has what a data set has besides."""

    def get_data_info(self, i):
        return dict(img_path=self.paths[i])


@pytest.fixture(scope='module')
def tool():
    return load_tool('stock_tool.py')


@pytest.fixture
def toys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # As in a process of its own: none was built before under the same name.
    monkeypatch.setattr(SegLocalVisualizer, '_instance_dict', OrderedDict())
    generate_toy_scenes(
        'data/toy_scenes', num_train=1, num_val=2, height=64, width=128)
    return tmp_path


def test_print_config(tool, toys, capsys):
    tool.main(['print_config', CONFIG])
    assert "type='TextFCNHead'" in capsys.readouterr().out


def test_browse_dataset(tool, toys):
    """Also classes whose colors are arrays, as of a data set without."""
    options = [
        '--cfg-options',
        'train_dataloader.dataset.metainfo.classes=[sky,building,road,'
        'sidewalk,pole,car,truck,person]',
        'train_dataloader.dataset.metainfo.palette=[]'
    ]
    words = ['browse_dataset', CONFIG, '--not-show', '--output-dir', 'shown']
    tool.main([*words, *options])
    image, = toys.glob('shown/**/*.png')
    assert cv2.imread(str(image)).shape == (64, 128, 3)


def test_confusion_matrix(tool, toys):
    """Perfect predictions, and then all is the first class."""
    truth = toys / 'data/toy_scenes/ann_dir/val'
    shutil.copytree(truth, 'predictions')
    taken = []
    plot = tool.plot_confusion_matrix
    tool.plot_confusion_matrix = lambda matrix, *args, **kwargs: (taken.append(
        matrix), plot(matrix, *args, **kwargs))
    words = ['confusion_matrix', CONFIG, 'predictions', 'out']
    tool.main(words)
    labels = np.stack([cv2.imread(str(p), 0) for p in truth.glob('*.png')])
    counts = np.bincount(labels[labels < 255], minlength=8)
    np.testing.assert_array_equal(taken[0], np.diag(counts))
    for path in (toys / 'predictions').iterdir():
        cv2.imwrite(str(path), np.zeros_like(labels[0]))
    tool.main(words)
    np.testing.assert_array_equal(taken[1][:, 0], counts)
    height, width = cv2.imread('out/confusion_matrix.png').shape[:2]
    assert height < 1000 and width < 1000  # MMSegmentation's: 3840 x 4800


@each_case('number, reduce', [(19, False), (150, True)])
def test_confusions_of_many_classes(tool, number, reduce):
    """Pixel by pixel; as `IoUMetric` writes what it predicts."""
    generator = np.random.default_rng(0)
    truth, found = generator.integers(0, number, (2, 3, 20, 30))
    truth[0, :2] = 255
    samples = [
        dict(
            data_samples=SegDataSample(
                gt_sem_seg=PixelData(data=torch.from_numpy(labels)[None])))
        for labels in truth
    ]
    dataset = Samples(samples)
    dataset.metainfo = dict(classes=[f'class {i}' for i in range(number)])
    dataset.ignore_index, dataset.reduce_zero_label = 255, reduce
    # Not in the order of their names, as frames or a list may be.
    dataset.paths = ['v/10.jpg', 'v/9.jpg', 'w/8.jpg']
    names = ['10.png', '9.png', '8.png']
    expected = np.zeros((number, number))
    for true, labels in zip(truth.flat, found.flat):
        if true != 255:
            expected[true, labels] += 1
    written = dict(zip(names, (found + reduce).astype(np.uint8)))
    matrix = tool.count_confusions(dataset, written)
    np.testing.assert_array_equal(matrix, expected)
    with pytest.raises(SystemExit, match='1 predictions.* 3 images.*8.png'):
        tool.count_confusions(dataset, {k: written[k] for k in names[:1]})
    # As of another tool, or of a network with more classes.
    found[0, -1] = -1 if reduce else number
    with pytest.raises(SystemExit, match='10.png has labels that are none'):
        tool.count_confusions(dataset, dict(zip(names, found + reduce)))
    dataset.paths[0] = 'w/9.jpg'
    with pytest.raises(SystemExit, match='2 images.* 9.png'):
        tool.count_confusions(dataset, written)
    assert dataset.METAINFO['classes'][-1] == f'class {number - 1}'


def test_what_is_no_tool_is_said(tool):
    with pytest.raises(SystemExit, match='has no tools/browse'):
        tool.main(['browse', CONFIG])
