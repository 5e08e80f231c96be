# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Released models: they load, predict, and are what their rows say."""
import hashlib
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmseg.apis import MMSegInferencer, inference_model, init_model
from processes import ROOT

from mmseg_textkd.apis import (TextSegInferencer, find_model, model_zoo,
                               released_models)
from mmseg_textkd.deploy.run import Network
from mmseg_textkd.text import TextEmbeddings
from mmseg_textkd.utils.checkpoint import load_strictly, read_checkpoint
from mmseg_textkd.utils.config import load_config

PICTURE = str(Path(ROOT, 'demo/pictures/street_26.jpg'))
ZOO = Path(ROOT, 'model_zoo')
CAMVID = Path(ROOT, 'data/camvid')
pytestmark = pytest.mark.skipif(
    not ZOO.is_dir(), reason='the released weights are in the repository only')
FOLDED = [name for name in released_models() if name.startswith('textkd_')]


def labels_of(config, weights):
    """Labels of the picture by MMSegmentation alone."""
    model = init_model(str(config), str(weights), device='cpu')
    pred = inference_model(model, PICTURE).pred_sem_seg.data[0].numpy()
    return pred, model.dataset_meta['classes']


@pytest.mark.parametrize('name', FOLDED)
def test_folded_and_text_weights_agree(name):
    config, weights = find_model(name)
    assert config.parent.name == 'stock'
    folded, names = labels_of(config, weights)
    assert names.index('car') == 8 and len(names) == 11
    # What anybody sees in the picture, about where it is.
    places = dict(sky=(.4, .1), tree=(.3, .4), car=(.15, .8), road=(.5, .9))
    places['building'] = .67, .55
    height, width = folded.shape
    for word, (x, y) in places.items():
        seen = folded[int(y * height), int(x * width)]
        assert names[seen] == word, word
    # The same through MMSegmentation's inferencer.
    inferencer = MMSegInferencer(str(config), str(weights), device='cpu')
    assert np.array_equal(inferencer(PICTURE)['predictions'], folded)
    config, weights = find_model(name, text=True)
    assert config.stem == name
    assert (labels_of(config, weights)[0] == folded).mean() > .999


def test_files_are_in_the_index_and_small():
    names = released_models()
    released = [find_model(n, text) for n in names for text in (False, True)]
    assert len(FOLDED) >= 1 and len(set(released)) >= 3
    for config, weights in set(released):
        state = read_checkpoint(weights)
        model = MODELS.build(load_config(config).model)
        load_strictly(model, state['state_dict'], weights)
        assert state['meta']['dataset_meta']['classes'][0] == 'sky'
        assert weights.stat().st_size < 10e6
        card = weights.with_suffix('.md').read_text()
        assert weights.name in card and '\n[' not in card
    weights = {path for _, path in released}
    assert weights == set(ZOO.glob('*.pth'))
    assert sum(p.stat().st_size for p in ZOO.iterdir()) < 25e6


def test_other_words():
    inferencer = TextSegInferencer(FOLDED[0], device='cpu')
    file = ZOO / 'street-words_vit-b16-openai.safetensors'
    words = ['house', 'street', 'SUV', 'vegetation', 'clouds']
    assert set(words) <= set(TextEmbeddings.load(file).names)
    trained = inferencer(PICTURE)['predictions']
    inferencer.set_classes(words, embeddings=file)
    asked = inferencer(PICTURE)['predictions']
    for new, old in enumerate((1, 3, 8, 5, 0)):
        both = (asked == new) & (trained == old)
        assert both.sum() > .5 * (trained == old).sum(), new


def test_deployed_folder_is_of_the_released_weights():
    """In 8 bits, with the program of this version."""
    folder, = ZOO.glob('*-onnx-int8')
    name = folder.name[:-len('-onnx-int8')]
    own = Path(ROOT, 'mmseg_textkd/deploy/run.py').read_bytes()
    assert (folder / 'run.py').read_bytes() == own
    config, weights = find_model(name)
    assert weights.name in (folder / 'README.md').read_text()
    digest = hashlib.sha256((folder / 'model.onnx').read_bytes()).hexdigest()
    assert digest in (folder / 'README.md').read_text()
    network = Network(folder, threads=1)
    labels, names = labels_of(config, weights)
    assert tuple(network.classes) == tuple(names)
    got = network(cv2.imread(PICTURE))
    assert (got == labels).mean() > .9


def test_wrong_names_and_files(tmp_path, monkeypatch):
    name, index = FOLDED[0], Path(ROOT, 'model-index.yml')
    with pytest.raises(ValueError, match=re.escape(name)):
        find_model(name.replace('textkd', 'txetkd'))
    with pytest.raises(ValueError, match='no released weights'):
        find_model('textkd_bisenetv2_fcn_vit-b16_1xb8-10k_camvid-360x480')
    with pytest.raises(ValueError, match='neither a file nor a model'):
        TextSegInferencer('no.py')
    with pytest.raises(ValueError, match='give the checkpoint too'):
        TextSegInferencer(find_model(name)[0])
    # As in a wheel: the index and configs, no weights.
    _, weights = find_model(name)
    monkeypatch.setattr(model_zoo, 'PACKAGE', tmp_path / 'mmseg_textkd')
    shutil.copy(index, tmp_path)
    for path in yaml.safe_load(index.read_text())['Import']:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(ROOT, path), tmp_path / path)
    with pytest.raises(FileNotFoundError, match='clone it'):
        find_model(name)
    copied = tmp_path / 'model_zoo' / weights.name
    copied.parent.mkdir()
    copied.write_bytes(weights.read_bytes()[:-1] + b'x')
    with pytest.raises(ValueError, match='not the released file'):
        find_model(name)


@pytest.mark.skipif(not CAMVID.is_dir(), reason='needs data/camvid')
@pytest.mark.parametrize('name', released_models())
def test_miou_is_that_of_the_row(name, tmp_path):
    """On the test images, of the weights that are deployed."""
    config, weights = find_model(name)
    entry = model_zoo._entries(Path(ROOT))[name]
    cfg = load_config(config)
    cfg.update(work_dir=str(tmp_path), load_from=str(weights))
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.test_dataloader.dataset.data_root = str(CAMVID)
    metrics = Runner.from_cfg(cfg).test()
    expected = entry['Results']['Metrics']['mIoU']
    assert metrics['mIoU'] == pytest.approx(expected, abs=.1)
