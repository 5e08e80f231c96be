# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Images of other bands and orders, and heads of one logit."""
import re
import sys

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from graphs import run_graph
from mmcv.transforms import BaseTransform
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmseg.apis import inference_model, init_model
from mmseg.models.backbones import ResNet
from mmseg.registry import MODELS, TRANSFORMS
from network_tester import samples
from tiny import (BACKBONE, CLASSES, CONTROL, SIZE, predict_logits, run,
                  save_weights, stir, tiny_config)
from tool_modules import call, load_tool

from mmseg_textkd.apis import TextSegInferencer
from mmseg_textkd.deploy import fold, fold_state_dict, to_stock_cfg, verify
from mmseg_textkd.deploy.export import to_torchscript
from mmseg_textkd.deploy.exportable import ExportableSegmentor
from mmseg_textkd.deploy.run import Network
from mmseg_textkd.deploy.words import set_words
from mmseg_textkd.models.input_channels import input_channels
from mmseg_textkd.utils.config import REGISTRIES, load_config
from mmseg_textkd.utils.io import UnknownImageError


def bands_config(folder, bands, seen=None, **options):
    """A network for images of some bands."""
    cfg = tiny_config(folder, CONTROL, **options)
    cfg.model.backbone.in_channels = seen or bands
    cfg.model.data_preprocessor.update(mean=[9.] * bands, std=[3.] * bands)
    return cfg


def build(cfg):
    """A network whose batch norms are not trivial."""
    return stir(MODELS.build(cfg.model), .2).eval()


def write(folder, cfg, model, classes=CLASSES):
    """Write config and checkpoint as a run does."""
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.dump(folder / 'config.py')
    weights = save_weights(folder / 'weights.pth', model, classes)
    return str(folder / 'config.py'), weights


def preprocess(model, image):
    inputs = [torch.from_numpy(image).permute(2, 0, 1)]
    return model.data_preprocessor(dict(inputs=inputs))['inputs']


# Of six bands the backbone sees three at a time, as in change detection.
@each_case('bands, seen', [(1, 1), (4, 4), (12, 12), (6, 3)])
def test_bands_are_those_of_the_network(tmp_path, bands, seen):
    cfg = bands_config(tmp_path, bands, seen)
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
    expected = network.reference(image)
    torch.testing.assert_close(
        run_graph(export, image), expected, rtol=1e-4, atol=1e-4)
    assert len(network.spec()['mean']) == bands
    del cfg.model.data_preprocessor.mean, cfg.model.data_preprocessor.std
    assert input_channels(MODELS.build(cfg.model)) == bands


def test_costs_of_other_bands(tmp_path):
    tool = load_tool('analysis_tools/cost.py')
    three, four = (
        tool.count(tool.build(bands_config(tmp_path, bands)), (256, 512))
        for bands in (3, 4))
    assert float(four[1]) > float(three[1])


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
        first, second = map(super().forward, x.chunk(2, dim=1))
        return tuple(a - b for a, b in zip(first, second))


def test_two_images_in_one_tensor(tmp_path, capsys, monkeypatch):
    """Trained, folded by the tool, exported, predicted and counted."""
    tiny_config(tmp_path, CONTROL).dump(tmp_path / 'one.py')
    cfg = bands_config(tmp_path, 6, 3, max_iters=2)
    cfg.model.backbone.type = 'DifferenceOfTwo'
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.pipeline.insert(
            1, dict(type='LoadAnotherImage'))
    model = run(cfg).model.eval()
    cfg.dump(tmp_path / 'two.py')
    files = [str(tmp_path / name) for name in ('two.py', 'work/iter_2.pth')]
    out, path = tmp_path / 'folded.pth', str(tmp_path / 'data/img/0.png')
    call('model_converters/textkd2mmseg.py', *files, '--out', out, '--device',
         'cpu')
    image = cv2.imread(path)
    both = np.concatenate([image, image[:, ::-1]], axis=2)
    labels = predict_logits(model, preprocess(model, both)).argmax(1)[0]
    call('deployment/deploy.py', tmp_path / 'folded.py', out, '--out',
         tmp_path / 'net', '--to', 'torchscript')
    # Nearly equal scores may change places in another runtime.
    assert (Network(tmp_path / 'net')(both) == labels.numpy()).mean() > .999
    found = TextSegInferencer(*files, device='cpu')(path)['predictions']
    assert np.array_equal(found, labels) and len(labels.unique()) > 1
    counts = []
    for name in ('one', 'two'):
        words = 'tool', str(tmp_path / f'{name}.py'), '--size', '32', '64'
        monkeypatch.setattr(sys, 'argv', list(words))
        load_tool('analysis_tools/get_flops.py').main()
        said = re.search(r'Flops: (\S+)M', capsys.readouterr().out)[1]
        counts.append(float(said) * 1e3)
    plain = MODELS.build(dict(cfg.model.backbone, type='ResNet'))
    plain.eval()
    more = get_model_complexity_info(plain, inputs=torch.rand(1, 3, *SIZE))
    assert counts[1] - counts[0] == pytest.approx(
        more['flops'] / 1e3, abs=1.01)


def test_inference_on_four_bands(tmp_path):
    cfg = bands_config(tmp_path, 4)
    cfg.test_dataloader.dataset.pipeline[0].color_type = 'unchanged'
    model = build(cfg)
    files = write(tmp_path, cfg, model)
    inferencer = TextSegInferencer(*files, device='cpu', max_pixels=2047)
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 4), np.uint8)
    found = inferencer(image, return_vis=True)
    expected = predict_logits(model, preprocess(model, image)).argmax(1)[0]
    assert np.array_equal(found['predictions'], expected)
    assert found['visualization'].shape[0] == SIZE[0]
    with pytest.raises(ValueError, match=r'\(H, W, 4\), but got.*, 3\)'):
        inferencer(image[..., :3])
    # A file is bounded before it is read, and need not be known to Pillow.
    cv2.imwrite(str(tmp_path / 'a.png'), image)
    with pytest.raises(ValueError, match='more than the 2047 that'):
        inferencer(str(tmp_path / 'a.png'))


@each_case('rgb', [False, True])
def test_networks_that_see_bgr_or_rgb(tmp_path, rgb):
    cfg = tiny_config(tmp_path, CONTROL)
    # No two channels are treated alike.
    spec = dict(mean=[10., 100., 200.], std=[30., 60., 90.])
    cfg.model.data_preprocessor.update(spec, bgr_to_rgb=rgb)
    model = build(cfg)
    files = write(tmp_path, cfg, model)
    model.cfg, model.dataset_meta = cfg, dict(classes=CLASSES)
    path = str(tmp_path / 'data/img/0.png')
    image, (mean, std) = cv2.imread(path), spec.values()
    orders = []
    for pixels in (image, image[..., ::-1]):
        inputs = torch.tensor((pixels - mean) / std).permute(2, 0, 1)[None]
        orders.append(predict_logits(model, inputs.float())[0])
    expected, other = orders[::-1] if rgb else orders
    assert (expected - other).abs().max() > .1
    assert (expected.argmax(0) != other.argmax(0)).any()

    def assert_near(logits):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    assert_near(inference_model(model, image).seg_logits.data)
    stock = fold(model, cfg)
    assert_near(inference_model(stock, image).seg_logits.data)
    inferencer = TextSegInferencer(*files, device='cpu')
    for inputs in (path, image):
        found = inferencer(inputs)['predictions']
        assert np.array_equal(found, expected.argmax(0))
    (tmp_path / 'b.png').write_text('text')
    with pytest.raises(UnknownImageError, match='b.png'):
        inferencer(tmp_path / 'b.png')
    # With the preprocessing in the graph, and as it is described beside it.
    network = ExportableSegmentor(stock, preprocess=True)
    graph = to_torchscript(network, image.shape[:2], False, '{}')
    assert_near(run_graph(graph, torch.from_numpy(image)[None])[0])
    assert ExportableSegmentor(stock).spec() == dict(spec, swap_channels=rgb)


def binary_config(folder, number, role='classifier'):
    """MMSegmentation's binary set-up: one logit and a sigmoid."""
    cfg = tiny_config(folder, CONTROL)
    loss = dict(type='CrossEntropyLoss', use_sigmoid=True)
    cfg.model.decode_head.update(num_classes=number, out_channels=1, role=role)
    cfg.model.decode_head.update(threshold=.4, loss_decode=loss)
    return cfg


@each_case('number, names', [(2, ('soil', 'crack')), (1, ('crack', )),
                             (1, ('soil', 'crack'))])
def test_one_logit_is_trained_folded_and_thresholded(tmp_path, number, names):
    cfg = binary_config(tmp_path, number)
    model = build(cfg)
    head = model.decode_head
    classifier = head.conv_seg
    image = cv2.imread(str(tmp_path / 'data' / 'img' / '0.png'))
    with torch.no_grad():
        classifier.logit_bias.normal_()
        classifier.scale.log_scale.fill_(2.)
        # Half of the pixels of an image are of the class.
        classifier.logit_bias[-1] -= model(preprocess(model, image)).median()
    # One logit is the difference of those that two classes would have.
    feat = torch.randn(2, 16, 4, 8)
    weight = classifier.text()[..., None, None] * torch.tensor(2.).exp()
    expected = F.conv2d(
        classifier.projection(feat), weight, classifier.logit_bias)
    if number == 2:
        expected = expected[:, 1:] - expected[:, :1]
    torch.testing.assert_close(classifier(feat), expected)
    torch.testing.assert_close(
        classifier.as_conv()(feat), expected, rtol=1e-4, atol=1e-4)
    head.train()
    losses = head.loss([torch.randn(2, 8, 4, 8)], samples((32, 64), 2), {})
    losses['loss_ce'].backward()
    assert classifier.logit_bias.grad.abs().min() > 0
    model.eval()

    stock, state = to_stock_cfg(cfg), fold_state_dict(model)
    assert state['decode_head.conv_seg.weight'].shape == (1, 16, 1, 1)
    save_weights(tmp_path / 'folded.pth', state, names)
    images = [dict(inputs=[torch.from_numpy(image).permute(2, 0, 1)])]
    report = verify(model, stock, state, images)
    assert [a.differing for a in report.agreements] == [0, 0, 0]
    for key in ('weight', 'bias'):
        state[f'decode_head.conv_seg.{key}'] *= -1
    report = verify(model, stock, state, images, tolerance=None)
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


def test_classes_of_one_logit_change_places_or_stay(tmp_path):
    cfg = binary_config(tmp_path, 2)
    model = build(cfg)
    vectors, image = model.decode_head.text_branch.text(), torch.randn(
        1, 3, 32, 64)
    model.decode_head.text_branch.logit_bias.data.normal_()
    before = model(image, mode='tensor')
    for words in ([1], [0, 1, None]):
        with pytest.raises(ValueError, match='network of 1 logit'):
            set_words(model, cfg, vectors[[k or 0 for k in words]], words)
    set_words(model, cfg, vectors[[1, 0]], [1, 0])
    assert model.out_channels == model.decode_head.out_channels == 1
    torch.testing.assert_close(model(image, mode='tensor'), -before)
    beside = build(binary_config(tmp_path, 2, 'auxiliary'))
    with pytest.raises(ValueError, match='network of 1 logit'):
        set_words(beside, cfg, vectors[[1, 0]], [1, 0])


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


OWN_BACKBONE = """from mmengine.model import BaseModule
from mmseg.registry import MODELS


@MODELS.register_module()
class OwnBackbone(BaseModule):
    pass
"""


def test_pure_python_configs_are_configs(tmp_path, monkeypatch):
    cfg = tiny_config(tmp_path, CONTROL, dict(switch_at=3))
    config, weights = write(tmp_path, cfg, build(cfg), tuple('abcdefgh'))
    path = tmp_path / 'lazy.py'
    path.write_text(pure_python(Config.fromfile(config)))
    assert isinstance(Config.fromfile(path).model.type, type)
    assert load_config(path).to_dict() == cfg.to_dict()
    # Lazy ones need neither: what is read stands for their imports.
    text = path.read_text()
    bare = re.sub(
        r'^(custom_imports|default_scope) = .*?^(?=\w)',
        '',
        text,
        flags=re.MULTILINE | re.DOTALL)
    (tmp_path / 'own_nets.py').write_text(OWN_BACKBONE)
    monkeypatch.syspath_prepend(tmp_path)
    bare = bare.replace(f'type={BACKBONE["type"]}', 'type=OwnBackbone')
    path.write_text(f'from own_nets import OwnBackbone\n{bare}\n'
                    'default_scope = None\ncustom_imports = None\n')
    read = load_config(path)
    assert read.custom_imports.imports == ['mmseg_textkd', 'own_nets']
    stock = to_stock_cfg(read)
    assert stock.custom_imports.imports == ['own_nets']
    assert stock.default_scope == 'mmseg'
    assert stock.model.backbone.type == 'OwnBackbone'
    del MODELS.module_dict['OwnBackbone'], sys.modules['own_nets']
    path.write_text(text)
    # One that is loaded stays as it is.
    merged = load_config(cfg, {'model.decode_head.channels': 3})
    assert merged.model.decode_head.channels == 3
    assert load_config(cfg).to_dict() == cfg.to_dict() != merged.to_dict()
    found = TextSegInferencer(str(path), weights, device='cpu')
    assert found.classes == tuple('abcdefgh')
