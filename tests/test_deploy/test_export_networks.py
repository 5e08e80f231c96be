# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Networks with something particular, and what the check finds."""
import copy

import numpy as np
import onnxruntime
import pytest
import torch
from each_case import each_case
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmseg.registry import MODELS
from network_tester import CONFIGS, load_model
from tiny import tiny_config
from tool_modules import load_tool

from mmseg_textkd.deploy.adaptive_pool import MatrixAdaptiveAvgPool2d
from mmseg_textkd.deploy.export import Exported, to_onnx
from mmseg_textkd.deploy.export_check import check
from mmseg_textkd.deploy.exportable import ExportableSegmentor
from mmseg_textkd.deploy.load_stock import load_stock

deploy = load_tool('deployment/deploy.py')


def logits(model, image):
    with torch.no_grad():
        return model.encode_decode(image, [dict(img_shape=image.shape[2:])])


# What is particular: pooling to bins that do not divide; padding in testing
# and random numbers.
NETWORKS = {
    'fast_scnn': (['--dynamic', '--no-preprocess'], (70, 102)),
    'segnext_mscan-t': (['--output', 'probabilities', '--dynamic'], (50, 75)),
}


@each_case('name', NETWORKS)
def test_networks(name, tmp_path):
    options, size = NETWORKS[name]
    path, = CONFIGS.glob(f'stock/{name}*camvid*.py')
    cfg = load_model(path)
    if 'segnext' in name:
        cfg.backbone.depths = [1, 1, 1, 1]
        cfg.decode_head.ham_kwargs.eval_steps = 1
        cfg.data_preprocessor.test_cfg = dict(size_divisor=32)
    model = revert_sync_batchnorm(MODELS.build(cfg))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(.1, .5)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    dataset = dict(type='BaseSegDataset', metainfo=dict(classes=['x'] * 11))
    cfg = Config(dict(model=cfg, test_dataloader=dict(dataset=dataset)))
    cfg.dump(tmp_path / 'cfg.py')
    paths = [str(tmp_path / file) for file in ('cfg.py', 'model.pth', 'out')]
    deploy.main([
        *paths[:2], '--out', paths[2], '--to', 'onnx', '--size', '64', '96',
        *options
    ])
    if 'segnext' in name:
        # By hand: normalized, RGB, padded to multiples of 32, cropped.
        model = load_stock(*paths[:2])[1]
        image = torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8)
        processor = model.data_preprocessor
        inputs = image[0].permute(2, 0, 1)[[2, 1, 0]].float()
        inputs = (inputs - processor.mean) / processor.std
        padded = torch.zeros(1, 3, 64, 96)
        padded[0, :, :size[0], :size[1]] = inputs
        expected = logits(model, padded)[..., :size[0], :size[1]].softmax(1)
    else:
        image = torch.randn(1, 3, *size)
        expected = logits(model.eval(), image)
    assert expected.std() > 1e-3
    session = onnxruntime.InferenceSession(
        f'{paths[2]}/model.onnx', providers=['CPUExecutionProvider'])
    found, = session.run(None, {'image': image.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)
    if 'probabilities' in options:
        np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)


@pytest.fixture
def model(tmp_path):
    """A tiny network."""
    return MODELS.build(tiny_config(tmp_path).model).eval()


def test_check_finds_another_network(model):
    same = ExportableSegmentor(copy.deepcopy(model))

    @torch.no_grad()
    def run(image):
        return same(image)

    @torch.no_grad()
    def run_labels(image):
        return same(image).argmax(1).byte()

    scores = ExportableSegmentor(model), Exported(b'', run)
    labels = ExportableSegmentor(model, 'argmax'), Exported(b'', run_labels)
    images = [same.example((32, 64))]
    found = check('x', *scores, images)
    assert str(found).endswith('; another class at 0 of 2048 pixels')
    assert found.difference == 0 and found.largest > 0
    found = check('x', *labels, images)
    assert str(found) == 'x: another class at 0 of 2048 pixels'
    with pytest.raises(ValueError, match='does not run: .*Double'):
        check('x', scores[0], Exported(b'', lambda x: run(x.double())), images)
    with pytest.raises(ValueError, match=r'shape .* instead of \(1, 8, 32'):
        check('x', scores[0], Exported(b'', lambda x: run(x[..., :8])), images)
    bias = model.decode_head.conv_seg.bias.data
    bias[0] += 0.25
    with pytest.raises(ValueError, match=r'differs by 0\.25 from scores'):
        check('x', *scores, images)
    found = check('x', *scores, images, exact=False)
    assert found.difference == pytest.approx(.25) and found.clear > 0
    bias[0] += 100
    with pytest.raises(ValueError, match=r'another class at \d+ pixels whose'):
        check('x', *labels, images)
    bias[0] = float('nan')
    with pytest.raises(ValueError, match='PyTorch itself predicts NaN'):
        check('x', *scores, images)


def test_ties_may_break_either_way(model):
    conv = model.decode_head.conv_seg
    conv.weight.data[:] = conv.weight.data[:1]
    conv.bias.data[:] = torch.tensor([0., 1e-5] + [-1.] * 6)
    labels = ExportableSegmentor(model, 'argmax')
    zeros = torch.zeros(1, 32, 64, dtype=torch.uint8)
    said = check('x', labels, Exported(b'', lambda image: zeros),
                 [labels.example((32, 64))])
    assert str(said) == (
        'x: another class at 2048 of 2048 pixels, all of them '
        'ties within what is allowed')


def test_operator_that_does_not_export_is_named(model):
    model.encode_decode = lambda inputs, metas: torch.linalg.inv(inputs)
    network = ExportableSegmentor(model)
    with pytest.raises(ValueError, match='linalg_inv.*--size H W'):
        to_onnx(network, (32, 32), True, '{}')
    model.encode_decode = lambda inputs, metas: inputs[:, :int(inputs.sum())]
    with pytest.raises(ValueError, match='test_export_networks.py:.*--size H'):
        to_onnx(network, (32, 32), True, '{}')


@pytest.mark.parametrize(
    'padding',
    [dict(size=(48, 40)), dict(size_divisor=32)])
def test_padding_in_testing(model, padding):
    image = torch.randint(0, 256, (1, 40, 50, 3), dtype=torch.uint8)
    network = ExportableSegmentor(model, preprocess=True)
    plain = network(image)
    model.data_preprocessor.test_cfg = padding
    # What MMSegmentation does, padding and cropping included.
    assert torch.equal(network(image), network.reference(image))
    assert plain.shape == (1, 8, 40, 50)
    assert not torch.allclose(network(image), plain, atol=1e-4)


@each_case('size', [(3, 5), (7, 11), (12, 24), (1, 2)])
@each_case('bins', [(1, 1), (2, 2), (3, 3), (6, 6), (2, 5)])
def test_pooling_by_matrices(size, bins):
    x = torch.randn(2, 4, *size)
    torch.testing.assert_close(
        MatrixAdaptiveAvgPool2d(bins)(x),
        torch.nn.functional.adaptive_avg_pool2d(x, bins))
