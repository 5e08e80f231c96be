# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Images of other bands, and heads of one logit, as their users have them."""
import re
import sys

import cv2
import numpy as np
import pytest
import torch
from each_case import each_case
from mmcv.transforms import BaseTransform
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.apis import inference_model, init_model
from mmseg.models.backbones import ResNet
from mmseg.registry import MODELS, TRANSFORMS
from network_tester import samples
from tiny import SIZE, run, tiny_config
from tool_modules import load_tool

from mmseg_textkd.apis import TextSegInferencer
from mmseg_textkd.deploy import fold_state_dict, to_stock_cfg, verify
from mmseg_textkd.deploy.export import to_torchscript
from mmseg_textkd.deploy.exportable import ExportableSegmentor
from mmseg_textkd.deploy.run import Network
from mmseg_textkd.models.input_channels import input_channels
from mmseg_textkd.utils.config import REGISTRIES, load_config
from mmseg_textkd.utils.io import UnknownImageError

CONTROL = dict(type='ControlEmbeddings', kind='random', dim=16)


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


def build(cfg):
    """A network whose batch norms are not trivial."""
    model = MODELS.build(cfg.model)
    model.init_weights()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(.5, 2)
    return model.eval()


def write(folder, cfg, model, classes):
    """Write config and checkpoint as a run does."""
    palette = [[10 * k, 0, 0] for k in range(len(classes))]
    torch.save(
        dict(
            state_dict=model.state_dict(),
            meta=dict(dataset_meta=dict(classes=classes, palette=palette))),
        folder / 'weights.pth')
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.dump(folder / 'config.py')
    return str(folder / 'config.py'), str(folder / 'weights.pth')


# Of six bands the backbone sees three at a time, as in change detection.
@each_case('bands, seen', [(1, 1), (4, 4), (12, 12), (6, 3)])
def test_bands_are_those_of_the_network(tmp_path, bands, seen):
    cfg = tiny_config(tmp_path, CONTROL)
    cfg.model.backbone.in_channels = seen
    cfg.model.data_preprocessor.update(mean=[9.] * bands, std=[3.] * bands)
    model = build(cfg)
    assert input_channels(model) == bands
    if seen != bands:
        return
    stock = to_stock_cfg(cfg)
    report = verify(model, stock, fold_state_dict(model))
    assert all(a.differing == 0 for a in report.agreements)
    folded = MODELS.build(stock.model).eval()
    network = ExportableSegmentor(folded, preprocess=True)
    image = network.example(SIZE)
    assert image.shape == (1, *SIZE, bands)
    export = to_torchscript(network, SIZE, False, '')
    torch.testing.assert_close(
        export.run(image), network.reference(image), rtol=1e-4, atol=1e-4)
    assert len(network.spec()['mean']) == bands
    del cfg.model.data_preprocessor.mean, cfg.model.data_preprocessor.std
    assert input_channels(MODELS.build(cfg.model)) == bands


def test_costs_of_other_bands(tmp_path, capsys):
    tool, found = load_tool('analysis_tools/cost.py'), []
    for bands in (3, 4):
        cfg = tiny_config(tmp_path, CONTROL)
        cfg.model.backbone.in_channels = bands
        cfg.model.data_preprocessor.update(mean=[9.] * bands, std=[3.] * bands)
        found.append(tool.count(tool.build(cfg), (256, 512)))
    assert float(found[1][1]) > float(found[0][1])


@TRANSFORMS.register_module()
class LoadAnotherImage(BaseTransform):
    """Put the mirrored image behind the image, as one of another time."""

    def transform(self, results):
        image = results['img']
        results['img'] = np.concatenate([image, image[:, ::-1]], axis=2)
        return results


@MODELS.register_module()
class DifferenceOfTwo(ResNet):
    """What two images in one tensor have not in common."""

    def forward(self, x):
        first, second = (
            super(DifferenceOfTwo, self).forward(image)
            for image in x.chunk(2, dim=1))
        return tuple(a - b for a, b in zip(first, second))


def flops(config, capsys, monkeypatch):
    """Thousands of operations that tools/analysis_tools/get_flops.py finds."""
    monkeypatch.setattr(sys, 'argv',
                        ['get_flops.py', config, '--size', *map(str, SIZE)])
    load_tool('analysis_tools/get_flops.py').main()
    found = re.search(r'Flops: (\S+)M', capsys.readouterr().out)
    return float(found[1]) * 1e3


def test_two_images_in_one_tensor(tmp_path, capsys, monkeypatch):
    """Trained, folded by the tool, exported, predicted and counted."""
    cfg = tiny_config(tmp_path, CONTROL, max_iters=2)
    cfg.dump(tmp_path / 'one.py')
    cfg.model.backbone.type = 'DifferenceOfTwo'
    cfg.model.data_preprocessor.update(mean=[9.] * 6, std=[3.] * 6)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.pipeline.insert(
            1, dict(type='LoadAnotherImage'))
    model = run(cfg).model.eval()
    cfg.dump(tmp_path / 'two.py')
    files = [str(tmp_path / name) for name in ('two.py', 'work/iter_2.pth')]
    out = str(tmp_path / 'folded.pth')
    load_tool('model_converters/textkd2mmseg.py').main(
        [*files, '--out', out, '--device', 'cpu'])
    image = cv2.imread(str(tmp_path / 'data' / 'img' / '0.png'))
    both = np.concatenate([image, image[:, ::-1]], axis=2)
    batch = model.data_preprocessor(
        dict(inputs=[torch.from_numpy(both).permute(2, 0, 1)]))
    expected = model.encode_decode(batch['inputs'], [dict(img_shape=SIZE)])
    labels = expected.argmax(1)[0].numpy()
    load_tool('deployment/deploy.py').main([
        str(tmp_path / 'folded.py'), out, '--out',
        str(tmp_path / 'net'), '--to', 'torchscript'
    ])
    # Nearly equal scores may change places in another runtime.
    assert (Network(tmp_path / 'net')(both) == labels).mean() > .999
    found = TextSegInferencer(
        *files,
        device='cpu')(str(tmp_path / 'data' / 'img' / '0.png'))['predictions']
    assert np.array_equal(found, labels) and len(np.unique(labels)) > 1
    one, two = (
        flops(str(tmp_path / f'{name}.py'), capsys, monkeypatch)
        for name in ('one', 'two'))
    plain = MODELS.build(dict(cfg.model.backbone, type='ResNet'))
    plain.eval()
    more = get_model_complexity_info(plain, inputs=torch.rand(1, 3, *SIZE))
    assert two - one == pytest.approx(more['flops'] / 1e3, abs=1.01)


def test_inference_on_four_bands(tmp_path):
    cfg = tiny_config(tmp_path, CONTROL)
    cfg.model.backbone.in_channels = 4
    cfg.model.data_preprocessor.update(mean=[9.] * 4, std=[3.] * 4)
    for transform in cfg.test_dataloader.dataset.pipeline:
        if transform.type == 'LoadImageFromFile':
            transform.color_type = 'unchanged'
    model = build(cfg)
    files = write(tmp_path, cfg, model, tuple('abcdefgh'))
    inferencer = TextSegInferencer(*files, device='cpu')
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 4), np.uint8)
    found = inferencer(image, return_vis=True)
    with torch.no_grad():
        batch = model.data_preprocessor(
            dict(inputs=[torch.from_numpy(image).permute(2, 0, 1)]))
        expected = model(batch['inputs'])
    expected = torch.nn.functional.interpolate(
        expected, SIZE, mode='bilinear', align_corners=False).argmax(1)[0]
    assert np.array_equal(found['predictions'], expected)
    assert found['visualization'].shape[0] == SIZE[0]
    with pytest.raises(ValueError, match=r'\(H, W, 4\), but got.*, 3\)'):
        inferencer(image[..., :3])
    # A file is bounded before it is read, and need not be known to Pillow.
    cv2.imwrite(str(tmp_path / 'a.png'), image)
    inferencer.max_pixels = 100
    with pytest.raises(ValueError, match='more than the 100 that'):
        inferencer(str(tmp_path / 'a.png'))


def test_files_are_bounded(tmp_path):
    cfg = tiny_config(tmp_path, CONTROL)
    files = write(tmp_path, cfg, build(cfg), tuple('abcdefgh'))
    inferencer = TextSegInferencer(*files, device='cpu', max_pixels=2047)
    path = tmp_path / 'data' / 'img' / '0.png'
    with pytest.raises(ValueError, match='64 x 32 = 2048 pixels.*max_pixels'):
        inferencer(path)
    (tmp_path / 'b.png').write_text('text')
    with pytest.raises(UnknownImageError, match='b.png'):
        inferencer(tmp_path / 'b.png')


def binary_config(folder, number, role='classifier'):
    """MMSegmentation's binary set-up: one logit and a sigmoid."""
    cfg = tiny_config(folder, CONTROL)
    cfg.model.decode_head.update(
        num_classes=number,
        out_channels=1,
        role=role,
        threshold=.4,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True))
    return cfg


@each_case('number, names', [(2, ('soil', 'crack')), (1, ('crack', )),
                             (1, ('soil', 'crack'))])
def test_one_logit_is_trained_folded_and_thresholded(tmp_path, number, names):
    cfg = binary_config(tmp_path, number)
    model = build(cfg)
    head = model.decode_head
    with torch.no_grad():
        head.conv_seg.logit_bias.normal_()
        head.conv_seg.scale.log_scale.fill_(2.)
        # Half of the pixels of an image are of the class.
        image = cv2.imread(str(tmp_path / 'data' / 'img' / '0.png'))
        batch = model.data_preprocessor(
            dict(inputs=[torch.from_numpy(image).permute(2, 0, 1)]))
        head.conv_seg.logit_bias[-1] -= model(batch['inputs']).median()
    # One logit is the difference of those that two classes would have.
    feat = torch.randn(2, 16, 4, 8)
    text = head.conv_seg.text()
    pixels = head.conv_seg.projection(feat)
    logits = torch.einsum('ndhw,kd->nkhw', pixels, text) * torch.tensor(
        2.).exp() + head.conv_seg.logit_bias[:, None, None]
    expected = logits if number == 1 else logits[:, 1:] - logits[:, :1]
    torch.testing.assert_close(head.conv_seg(feat), expected)
    torch.testing.assert_close(
        head.conv_seg.as_conv()(feat), expected, rtol=1e-4, atol=1e-4)
    head.train()
    losses = head.loss([torch.randn(2, 8, 4, 8)], samples((32, 64), 2), {})
    losses['loss_ce'].backward()
    assert head.conv_seg.logit_bias.grad.abs().min() > 0
    model.eval()

    stock, state = to_stock_cfg(cfg), fold_state_dict(model)
    assert state['decode_head.conv_seg.weight'].shape == (1, 16, 1, 1)
    report = verify(model, stock, state)
    assert [a.differing for a in report.agreements] == [0, 0]
    for key in ('weight', 'bias'):
        state[f'decode_head.conv_seg.{key}'] *= -1
    report = verify(model, stock, state, tolerance=None)
    assert min(a.differing for a in report.agreements) > 0

    files = write(tmp_path, cfg, model, names)
    inferencer = TextSegInferencer(*files, device='cpu')
    theirs = inference_model(init_model(*files, device='cpu'), image)
    theirs = theirs.pred_sem_seg.data[0].numpy()
    assert np.array_equal(inferencer(image)['predictions'], theirs)
    assert 0 < theirs.mean() < 1
    assert inferencer.classes[-1] == 'crack' and len(inferencer.classes) == 2
    inferencer.set_classes(threshold=.999)
    assert inferencer(image)['predictions'].mean() < theirs.mean()
    assert len(inferencer.classes) == 2
    found = inferencer(image, similarity=['crack'])['similarity']
    assert found.shape == (1, *image.shape[:2]) and abs(found).max() <= 1

    torch.save(
        dict(
            state_dict=fold_state_dict(model),
            meta=dict(dataset_meta=dict(classes=names))),
        tmp_path / 'folded.pth')
    stock.dump(tmp_path / 'stock.py')
    folded = TextSegInferencer(
        str(tmp_path / 'stock.py'), tmp_path / 'folded.pth', device='cpu')
    assert np.array_equal(folded(image)['predictions'], theirs)
    if number == 2:
        with pytest.raises(ValueError, match='one logit for its classes'):
            folded.set_classes(['crack'])


@each_case('number, change, message', [
    (2, dict(text_branch=dict(norm='l2')), "neither.*norm='l2'"),
    (2, dict(text_branch=dict(unseen=[1], bias=False)), 'neither.*unseen'),
    (2, dict(text_branch=dict(type='BalancedTextClassifier')), 'no form'),
    (1, dict(text_losses=[dict(type='TextAlignmentLoss')]),
     'num_classes=2, out_channels=1'),
    (1, dict(role='auxiliary'), 'num_classes=2, out_channels=1'),
    (3, dict(), '3.*one for two classes|out_channels'),
])
def test_what_one_logit_cannot_have(tmp_path, number, change, message):
    cfg = binary_config(tmp_path, number)
    cfg.model.decode_head.update(change)
    with pytest.raises((ValueError, TypeError), match=message):
        MODELS.build(cfg.model)


def test_a_binary_head_learns_with_text_beside_it(tmp_path):
    head = build(binary_config(tmp_path, 2, 'auxiliary')).decode_head.train()
    losses = head.loss([torch.randn(2, 8, 4, 8)], samples((32, 64), 2), {})
    assert {'loss_ce', 'loss_text_align'} <= set(losses)
    sum(v for k, v in losses.items() if 'loss' in k).backward()
    assert head.text_branch.projection.conv.weight.grad.abs().max() > 0


def pure_python(cfg):
    """The text of a config in MMEngine's other style."""
    lines = set()

    def name(match):
        kind = next(r.module_dict[match[1]] for r in REGISTRIES
                    if match[1] in r.module_dict)
        lines.add(f'from {kind.__module__} import {kind.__name__}')
        return f'type={kind.__name__}'

    text = re.sub(r"type='(\w+)'", name, cfg.pretty_text)
    return '\n'.join([*sorted(lines), text])


def test_pure_python_configs_are_configs(tmp_path):
    cfg = tiny_config(tmp_path, CONTROL, dict(switch_at=3))
    model = build(cfg)
    _, weights = write(tmp_path, cfg, model, tuple('abcdefgh'))
    path = tmp_path / 'lazy.py'
    path.write_text(pure_python(Config.fromfile(tmp_path / 'config.py')))
    lazy = Config.fromfile(path)
    assert isinstance(lazy.model.type, type)
    assert load_config(path).to_dict() == cfg.to_dict()
    # One of the old style comes back as it is.
    assert load_config(cfg) is cfg
    found = TextSegInferencer(str(path), weights, device='cpu')
    assert found.classes == tuple('abcdefgh')
