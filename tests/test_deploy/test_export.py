# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Exported networks against MMSegmentation's own path."""
import copy
import json
import os
import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Dict, NamedTuple

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmseg.apis import inference_model, init_model
from mmseg.registry import MODELS
from network_tester import CONFIGS, load_model
from tiny import CLASSES, run, tiny_config

from mmseg_textkd.deploy import fold_state_dict, to_stock_cfg

sys.path[:0] = [
    str(CONFIGS.parent / 'tools' / 'deployment'),
    str(CONFIGS.parent / 'demo')
]

import export_onnx  # noqa: E402
import export_torchscript  # noqa: E402
import onnx_runtime_demo  # noqa: E402
import quantize_onnx  # noqa: E402

PALETTE = [[i * 30, 255 - i * 30, 7 * i] for i in range(len(CLASSES))]


class Stock(NamedTuple):
    """Files of a stock run, what was exported, and what the tool said."""
    config: str
    weights: str
    images: Path
    miou: float
    out: Path
    said: Dict[str, str]


@pytest.fixture(scope='module')
def stock(tmp_path_factory):
    """Train a tiny stock network, with an auxiliary head, and export it."""
    root = tmp_path_factory.mktemp('stock')
    cfg = tiny_config(root, max_iters=40)
    cfg.optim_wrapper.optimizer.lr = .5
    cfg.default_hooks.checkpoint.interval = 40
    head = copy.deepcopy(cfg.model.decode_head)
    cfg.model.auxiliary_head = dict(head, in_index=1, in_channels=4)
    # To advise on sizes, `resize` then turns them into numbers.
    cfg.model.decode_head.align_corners = True
    for split in ('train', 'val', 'test'):
        metainfo = cfg[f'{split}_dataloader'].dataset.metainfo
        metainfo.palette = PALETTE
    cfg.test_pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='PackSegInputs')
    ]
    runner = run(cfg)
    cfg.dump(root / 'config.py')
    files = Stock(
        str(root / 'config.py'), str(root / 'work' / 'iter_40.pth'),
        root / 'data' / 'img',
        runner.val_loop.run()['mIoU'], root, {})
    for name, *options in [
        ('logits', '--dynamic'),
        ('labels', '--preprocess', '--images', str(files.images)),
    ]:
        out = str(root / f'{name}.onnx')
        with redirect_stdout(StringIO()) as said:
            export_onnx.main([*files[:2], out, *options])
        files.said[name] = said.getvalue()
    return files


@pytest.fixture(scope='module')
def model(stock):
    return init_model(stock.config, stock.weights, device='cpu')


def onnx_run(path, image):
    session = onnxruntime.InferenceSession(
        str(path), providers=['CPUExecutionProvider'])
    output, = session.run(None, {'image': image})
    return output


@pytest.mark.stacks
def test_logits_at_any_size(stock, model):
    for size in ((32, 64), (50, 34), (97, 131)):
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = model.encode_decode(image, [dict(img_shape=size)])
        got = torch.from_numpy(
            onnx_run(stock.out / 'logits.onnx', image.numpy()))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(got.argmax(1), expected.argmax(1))


@pytest.mark.stacks
def test_labels_of_an_image_are_those_of_mmsegmentation(stock, model):
    for path in sorted(stock.images.iterdir()):
        image = cv2.imread(str(path))
        expected = inference_model(model, image).pred_sem_seg.data.numpy()
        got = onnx_run(stock.out / 'labels.onnx', image[None])
        assert got.dtype == np.uint8 and len(np.unique(expected)) > 2
        assert np.array_equal(got, expected)


def test_tool_says_how_near_it_comes(stock):
    number = r'\d[\d.e-]*'
    scores = (rf'scores differ by at most {number}, with scores of up to '
              rf'{number} \(allowed: {number}\); another class at')
    assert re.match(
        rf'random 32x64: {scores} 0 of 2048 pixels\n'
        rf'random 55x105: {scores} 0 of 5775 pixels\n'
        r'wrote .*logits\.onnx: logits, dynamic size, 0\.\d MB\n$',
        stock.said['logits'])
    # Though the graph gives labels alone, its scores are compared too.
    assert re.match(
        rf'random 32x64: {scores} 0 of 2048 pixels\n'
        rf'6 images of {stock.images}: {scores} 0 of 12288 pixels\n'
        r'wrote .*labels\.onnx: argmax, 32x64, 0\.\d MB\n$',
        stock.said['labels'])


def test_file_says_what_it_is(stock):
    graph = onnx.load(stock.out / 'labels.onnx')
    onnx.checker.check_model(graph, full_check=True)
    assert graph.opset_import[0].version == 20
    meta = json.loads({p.key: p.value
                       for p in graph.metadata_props}['mmseg_textkd'])
    assert meta['classes'] == list(CLASSES) and meta['palette'] == PALETTE
    assert meta['preprocess'] is None and meta['output'] == 'argmax'
    text = graph.SerializeToString()
    # No part of the auxiliary head, and nothing of this machine.
    assert b'auxiliary_head' not in text and b'.py' not in text
    meta = json.loads(
        onnx.load(stock.out / 'logits.onnx').metadata_props[0].value)
    assert meta['preprocess'] == dict(
        mean=[128.] * 3, std=[64.] * 3, swap_channels=False)


@pytest.mark.stacks
def test_torchscript(stock, model):
    out = str(stock.out / 'logits.pt')
    export_torchscript.main(
        [*stock[:2], out, '--dynamic', '--preprocess', '--output', 'logits'])
    found = {'mmseg_textkd.json': ''}
    loaded = torch.jit.load(out, _extra_files=found)
    assert json.loads(found['mmseg_textkd.json'])['classes'] == list(CLASSES)
    for size in ((32, 64), (45, 70)):
        image = torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8)
        expected = inference_model(model, image[0].numpy()).seg_logits.data
        torch.testing.assert_close(
            loaded(image)[0], expected, rtol=1e-4, atol=1e-4)


def test_bad_input_leaves_no_file(stock, tmp_path, capsys):
    out = str(tmp_path / 'out.onnx')
    state = torch.load(stock.weights, weights_only=True)['state_dict']
    bias = state['decode_head.conv_seg.bias']
    nan = {'decode_head.conv_seg.bias': bias * float('nan')}
    text = {'decode_head.conv_seg.text.class_embeddings': torch.ones(8, 4)}
    for name, change in (('nan', nan), ('text', text)):
        torch.save({**state, **change}, stock.out / f'{name}.pth')
    text_config, = CONFIGS.glob(
        'text_classifier/textkd_bisenetv2*toyclip*scenes*.py')
    camvid, = CONFIGS.glob('stock/bisenetv2*camvid*.py')
    empty = str(stock.out / 'empty')
    os.mkdir(empty)
    ddrnet, = CONFIGS.glob('stock/ddrnet_23-slim*camvid*.py')
    network = revert_sync_batchnorm(MODELS.build(load_model(ddrnet)))
    torch.save(network.state_dict(), stock.out / 'ddrnet.pth')
    ddrnet = str(ddrnet), str(stock.out / 'ddrnet.pth')
    for message, config, weights, *options in [
        ('textkd2mmseg.py', str(text_config), stock.weights),
        ('textkd2mmseg.py', stock.config, str(stock.out / 'text.pth')),
        ('gone.pth', stock.config, 'gone.pth'),
        ('gone.py', 'gone.py', stock.weights),
        ('NaN', stock.config, str(stock.out / 'nan.pth')),
        ('not of the network', str(camvid), stock.weights),
        ('is no checkpoint', stock.config, stock.config),
        ('does not run at 30x50', *ddrnet, '--size', '30', '50'),
        ('there are no images', *stock[:2], '--images', empty),
    ]:
        with pytest.raises(SystemExit, match=message):
            export_onnx.main([config, weights, out, *options])
    for message, target, *options in [
        ('no folder', str(tmp_path / 'a/b.onnx')),
        ('must end in .onnx', 'a.pt'),
        ('exists', str(stock.out / 'logits.onnx')),
        ('at least 18', out, '--opset', '17'),
        ('must be positive', out, '--size', '0', '8'),
        ('--softmax', out, '--softmax', '--output', 'argmax'),
    ]:
        with pytest.raises(SystemExit):
            export_onnx.main([*stock[:2], target, *options])
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_int8_stays_near(stock, model, capsys):
    float32, int8 = stock.out / 'labels.onnx', stock.out / 'int8.onnx'
    quantize_onnx.main([
        *map(str, (float32, int8)), '--calibration',
        str(stock.images), '--eval', stock.config
    ])
    said = capsys.readouterr().out
    images = [cv2.imread(str(path)) for path in stock.images.iterdir()]
    first, second = (
        np.stack([onnx_run(path, image[None]) for image in images])
        for path in (float32, int8))
    same = 100 * (first == second).mean()
    assert same > 95
    assert f'the same class at {same:.2f} % of the pixels of 6 images' in said
    # What MMSegmentation's own evaluation gave.
    assert f'FP32  {size_of(float32)}  mIoU {stock.miou:.2f}\n' in said
    miou = re.search(f'INT8  {size_of(int8)}  mIoU (.*)\n', said)[1]
    assert abs(float(miou) - stock.miou) < 5
    network = onnx_runtime_demo.Network(str(int8))
    assert network.classes == list(CLASSES)

    graph = onnx.load(int8).graph
    kinds = {node.op_type for node in graph.node}
    assert {'QuantizeLinear', 'DequantizeLinear'} <= kinds
    # The classifier has its weights as they were.
    weight = model.decode_head.conv_seg.weight.detach().numpy()
    assert any(
        np.array_equal(onnx.numpy_helper.to_array(tensor), weight)
        for tensor in graph.initializer)


def size_of(path):
    return f'{path.stat().st_size / 1e6:.2f} MB'


def test_bad_quantisation_leaves_no_file(stock, tmp_path):
    plain = str(tmp_path / 'plain.onnx')
    graph = onnx.load(stock.out / 'labels.onnx')
    graph.ClearField('metadata_props')
    onnx.save(graph, plain)
    cfg = Config.fromfile(stock.config)
    cfg.val_dataloader.dataset.metainfo.classes = CLASSES[::-1]
    other = str(tmp_path / 'other.py')
    cfg.dump(other)
    graph, out = str(stock.out / 'labels.onnx'), str(tmp_path / 'out.onnx')
    for message, source, folder, *options in [
        ('has not been exported by', plain, stock.images),
        ('not a graph', stock.config, stock.images),
        ('there are no images', graph, tmp_path),
        ('other classes', graph, stock.images, '--eval', other),
    ]:
        with pytest.raises(SystemExit, match=message):
            quantize_onnx.main(
                [source, out, '--calibration',
                 str(folder), *options])
    assert not Path(out).exists()


def test_demo_reads_every_kind_of_graph(stock, model):
    path = min(stock.images.iterdir())
    image = cv2.imread(str(path))
    expected = inference_model(model, image).pred_sem_seg.data[0].numpy()
    for name in ('logits', 'labels'):
        network = onnx_runtime_demo.Network(str(stock.out / f'{name}.onnx'))
        assert np.array_equal(network(image), expected)
        assert network.classes == list(CLASSES)
        assert network.colors[:, ::-1].tolist() == PALETTE


def test_lseg_exports_with_its_norm_and_its_blocks(tmp_path):
    """As `textkd2mmseg.py --l2 keep` writes it; text and plugin are gone."""
    text = dict(type='ControlEmbeddings', kind='random', dim=16)
    cfg = tiny_config(tmp_path, text)
    cfg.model.decode_head.text_branch = dict(
        norm='l2', bias=False, regularization=dict(depth=2))
    trained = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        blocks = trained.decode_head.text.regularization
        blocks.weight.add_(.3 * torch.randn(2, 3, 3))
    config, weights = tmp_path / 'kept.py', tmp_path / 'kept.pth'
    to_stock_cfg(cfg, keep_l2=True).dump(config)
    state = fold_state_dict(trained, keep_l2=True)
    meta = dict(dataset_meta=dict(classes=CLASSES))
    torch.save(dict(state_dict=state, meta=meta), weights)
    out = tmp_path / 'kept.onnx'
    export_onnx.main([str(config), str(weights), str(out), '--dynamic'])
    for size in (32, 64), (40, 56):
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = trained.encode_decode(image, [dict(img_shape=size)])
        logits = torch.from_numpy(onnx_run(out, image.numpy()))
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
