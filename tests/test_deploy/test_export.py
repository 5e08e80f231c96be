# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Deployed networks against MMSegmentation's own path."""
import copy
import hashlib
import importlib.util
import json
import re
import sys
from contextlib import redirect_stdout
from io import BytesIO, StringIO
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
from processes import ALONE, start
from tiny import CLASSES, run, tiny_config
from tool_modules import load_tool
from torch import nn

from mmseg_textkd.deploy import fold_state_dict, int8, tensorrt, to_stock_cfg
from mmseg_textkd.deploy.run import Network
from mmseg_textkd.deploy.runtimes import RUNTIMES

deploy = load_tool('deployment/deploy.py')
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
    cfg.model.auxiliary_head = head
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
        ('logits', '--dynamic', '--no-preprocess'),
        ('labels', '--output', 'argmax', '--images', str(files.images)),
    ]:
        with redirect_stdout(StringIO()) as said:
            deploy.main([
                *files[:2], '--out',
                str(root / name), '--to', 'onnx', *options
            ])
        files.said[name] = said.getvalue()
    return files


@pytest.fixture(scope='module')
def model(stock):
    return init_model(stock.config, stock.weights, device='cpu')


def onnx_run(path, image):
    session = onnxruntime.InferenceSession(
        str(path / 'model.onnx'), providers=['CPUExecutionProvider'])
    output, = session.run(None, {'image': image})
    return output


@pytest.mark.stacks
def test_logits_at_any_size(stock, model):
    for size in ((32, 64), (50, 34), (97, 131)):
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = model.encode_decode(image, [dict(img_shape=size)])
        got = torch.from_numpy(onnx_run(stock.out / 'logits', image.numpy()))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(got.argmax(1), expected.argmax(1))


@pytest.mark.stacks
def test_labels_of_an_image_are_those_of_mmsegmentation(stock, model):
    for path in sorted(stock.images.iterdir()):
        image = cv2.imread(str(path))
        expected = inference_model(model, image).pred_sem_seg.data.numpy()
        got = onnx_run(stock.out / 'labels', image[None])
        assert got.dtype == np.uint8 and len(np.unique(expected)) > 2
        assert np.array_equal(got, expected)


def test_tool_says_how_near_it_comes(stock):
    number = r'\d[\d.e-]*'
    scores = (rf'scores differ by at most {number}, with scores of up to '
              rf'{number}; ')
    assert re.match(
        rf'Only random inputs .*\nrandom 32x64: {scores}another class at 0 of '
        rf'2048 pixels\nrandom 55x105: {scores}another class at 0 of 5775 '
        r'pixels\nwrote .*logits: onnx, fp32, logits, 0\.\d+ MB',
        stock.said['logits'])
    assert re.match(
        'random 32x64: another class at 0 of 2048 pixels\n'
        f'6 images of {stock.images}: another class at 0 of 12288 pixels\n'
        r'wrote .*labels: onnx, fp32, argmax, 0\.\d+ MB', stock.said['labels'])


def test_folder_says_what_it_is(stock):
    folder = stock.out / 'labels'
    assert {p.name
            for p in folder.iterdir()} == {
                'README.md', 'classes.txt', 'model.onnx', 'network.json',
                'run.py'
            }
    meta = json.loads((folder / 'network.json').read_text())
    data = (folder / 'model.onnx').read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    assert meta['sha256'] == {'model.onnx': sha256}
    assert meta['size'] == [32, 64] and meta['preprocess'] is None
    assert meta['input'] == dict(
        shape=[1, 32, 64, 3], dtype='uint8', layout='NHWC')
    assert meta['versions']['onnxruntime'] == onnxruntime.__version__
    assert [c['differing'] for c in meta['checks']] == [0, 0]
    page = (folder / 'README.md').read_text()
    for said in (sha256, '1 x 32 x 64 x 3, uint8, NHWC', 'iter_40.pth',
                 'python run.py', meta['checks'][1]['text']):
        assert said in page
    rows = (folder / 'classes.txt').read_text().splitlines()
    assert rows[3] == '90 165 21 sidewalk' and len(rows) == len(CLASSES)

    graph = onnx.load(folder / 'model.onnx')
    onnx.checker.check_model(graph, full_check=True)
    assert graph.opset_import[0].version == 20
    # No part of the auxiliary head, and nothing of this machine.
    assert b'auxiliary_head' not in data and b'.py' not in data
    meta = json.loads((stock.out / 'logits' / 'network.json').read_text())
    assert meta['size'] is None and meta['preprocess'] == dict(
        mean=[128.] * 3, std=[64.] * 3, swap_channels=False)


@pytest.mark.stacks
def test_torchscript(stock, model):
    out = stock.out / 'script'
    deploy.main(
        [*stock[:2], '--out',
         str(out), '--to', 'torchscript', '--dynamic'])
    found = {'mmseg_textkd.json': ''}
    loaded = torch.jit.load(str(out / 'model.pt'), _extra_files=found)
    assert json.loads(found['mmseg_textkd.json'])['classes'] == list(CLASSES)
    for size in ((32, 64), (45, 70)):
        image = torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8)
        expected = inference_model(model, image[0].numpy()).seg_logits.data
        torch.testing.assert_close(
            loaded(image)[0], expected, rtol=1e-4, atol=1e-4)


def runtime(name, *modules):
    """A runtime, skipped with the reason where it is not installed."""
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    return pytest.param(
        name,
        marks=pytest.mark.skipif(
            bool(missing), reason=f'{", ".join(missing)} not installed'))


@pytest.mark.runtimes
@pytest.mark.parametrize('name', [
    runtime('openvino', 'openvino'),
    runtime('ncnn', 'ncnn', 'pnnx'),
    runtime('litert', 'litert_torch'),
    runtime('executorch', 'executorch'),
    runtime('tensorrt')
])
def test_runtime_predicts_what_mmsegmentation_does(stock, model, name):
    """The folder is read as a user reads it."""
    out = stock.out / name
    deploy.main([
        *stock[:2], '--out',
        str(out), '--to', name, '--images',
        str(stock.images), '--eval', stock.config
    ])
    network = Network(out, threads=1)
    for path in sorted(stock.images.iterdir()):
        image = cv2.imread(str(path))
        expected = inference_model(model, image)
        scores = expected.seg_logits.data[None].numpy()
        got = network.predict(network.inputs(image))
        np.testing.assert_allclose(
            got, scores, rtol=0, atol=1e-4 * np.abs(scores).max())
        assert np.array_equal(
            network(image), expected.pred_sem_seg.data[0].numpy())
    meta = json.loads((out / 'network.json').read_text())
    assert round(meta['mIoU'], 2) == round(stock.miou, 2)
    # As a user runs it, who has none of what made it.
    if name != 'executorch':  # its binding takes tensors of PyTorch
        shown = stock.out / f'{name}.png'
        alone = ALONE.format(script=str(out / 'run.py'))
        done = start(
            'python', '-c', alone, path, '--out', shown, cwd=str(stock.out))
        assert done.status == 0, done.output
        assert cv2.imread(str(shown)).shape == (32, 64 + 160, 3)
    if name == 'tensorrt':
        page = (out / 'README.md').read_text()
        assert 'trtexec --onnx=model.onnx' in page
        assert 'Not run in TensorRT' in page
        compile((out / 'build.py').read_text(), 'build.py', 'exec')


@pytest.mark.runtimes
@pytest.mark.parametrize('name', [
    runtime('onnx'),
    runtime('openvino', 'openvino', 'nncf'),
])
def test_int8_stays_near(stock, model, name):
    out = stock.out / f'int8-{name}'
    deploy.main([
        *stock[:2], '--out',
        str(out), '--to', name, '--precision', 'int8', '--calibrate',
        str(stock.images), '--eval', stock.config
    ])
    network = Network(out)
    images = [cv2.imread(str(path)) for path in stock.images.iterdir()]
    expected = np.stack([
        inference_model(model, image).pred_sem_seg.data[0] for image in images
    ])
    got = np.stack([network(image) for image in images])
    # Of a network that has hardly learned; the mIoU below is what counts.
    assert (got == expected).mean() > .9
    meta = json.loads((out / 'network.json').read_text())
    assert round(meta['mIoU_fp32'], 2) == round(stock.miou, 2)
    # Layers would have stayed in float32 otherwise, all of them in the end.
    assert meta['mIoU_fp32'] - meta['mIoU'] <= 1
    assert meta['float32_layers']
    weight = model.decode_head.conv_seg.weight.detach().numpy()
    if name == 'onnx':
        graph = onnx.load(out / 'model.onnx').graph
        kinds = {node.op_type for node in graph.node}
        assert {'QuantizeLinear', 'DequantizeLinear'} <= kinds
        # The classifier has its weights as they were.
        assert any(
            np.array_equal(onnx.numpy_helper.to_array(tensor), weight)
            for tensor in graph.initializer)
    else:
        assert 'FakeQuantize' in (out / 'model.xml').read_text()


@pytest.mark.parametrize('activation', ['ReLU', 'ReLU6'])
def test_int8_ranges_are_those_after_the_activation(activation):
    """Extremes that it cuts off do not widen the steps; none saturate."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        getattr(nn, activation)(), nn.Conv2d(16, 4, 1))
    # Channels that it cuts off, at either end.
    nn.init.constant_(net[0].bias[:4], -200)
    if activation == 'ReLU6':
        nn.init.constant_(net[0].bias[4:8], 200)
    inputs = [torch.randn(1, 3, 16, 16) for _ in range(4)]
    file = BytesIO()
    torch.onnx.export(
        net, inputs[0], file, input_names=['image'], dynamo=False)
    arrays = [x.numpy() for x in inputs]
    files = int8.onnx_int8({'model.onnx': file.getvalue()}, arrays, [])
    session = onnxruntime.InferenceSession(files['model.onnx'])
    got = np.concatenate([session.run(None, {'image': x})[0] for x in arrays])
    expected = net(torch.cat(inputs)).detach().numpy()
    spread = np.abs(expected - expected.mean((0, 2, 3), keepdims=True)).max()
    assert np.abs(got - expected).max() < .1 * spread


@pytest.mark.parametrize('name', ['onnx', runtime('openvino', 'openvino')])
def test_half_precision(stock, name):
    out = stock.out / f'half-{name}'
    deploy.main(
        [*stock[:2], '--out',
         str(out), '--to', name, '--precision', 'fp16'])
    meta = json.loads((out / 'network.json').read_text())
    found, = meta['checks']
    assert 0 < found['difference'] < .01 * found['largest']
    weights = 'model.onnx' if name == 'onnx' else 'model.bin'
    # Against the same network in float32; the graph itself stays.
    whole = stock.out / f'whole-{name}'
    deploy.main([*stock[:2], '--out', str(whole), '--to', name])
    saved = (whole / weights).stat().st_size - (out / weights).stat().st_size
    assert saved > .8 * 2 * meta['params']


def test_names_of_the_tool_are_those_of_the_package():
    """It names them itself, for `--help` comes before what takes time."""
    assert deploy.NAMES == tuple(RUNTIMES)
    assert deploy.NORMALIZED == tuple(name
                                      for name, runtime in RUNTIMES.items()
                                      if not runtime.preprocess)


def test_layers_stay_in_float32_until_the_loss_is_small():
    """Which ones: those whose absence from int8 helps most, in this order."""
    harm = {f'conv{i}': h for i, h in enumerate([0, 3, 0, 9, 0, 0, 0, 0])}
    tried = []

    def quantize(files, inputs, kept):
        tried.append(list(kept))
        return dict(kept=kept)

    def loss(files):
        return sum(h for name, h in harm.items() if name not in files['kept'])

    quantizer = int8.Quantizer(lambda files: [*harm, 'last'], quantize, ())
    for allowed, kept in [(12, ['last']), (3, ['last', 'conv3']),
                          (1, ['last', 'conv3', 'conv1'])]:
        found = int8.quantize(quantizer, {}, [], loss, loss, allowed)
        assert found.kept == kept == tried[-1]
    # Nobody to ask: only the classifier.
    assert int8.quantize(quantizer, {}, []).kept == ['last']


def test_tensorrt_refuses_what_it_lacks():
    """Operators, modes, sizes and opset, all in one message."""
    x, y = (onnx.helper.make_tensor_value_info(name, 1, shape)
            for name, shape in (('x', [1, 3, 'h', 8]), ('y', None)))
    nodes = [
        onnx.helper.make_node('Resize', ['x', '', 's'], ['a'], mode='cubic'),
        onnx.helper.make_node('Det', ['a'], ['y'])
    ]
    scales = onnx.numpy_helper.from_array(np.float32([1, 1, 2, 2]), 's')
    for opset, nothing in ((20, None), (21, 'opset 21')):
        graph = onnx.helper.make_graph(nodes, 'g', [x], [y], [scales])
        data = onnx.helper.make_model(
            graph,
            opset_imports=[onnx.helper.make_opsetid('', opset)],
            ir_version=10).SerializeToString()
        with pytest.raises(ValueError) as error:
            tensorrt.check_graph(data)
        said = str(error.value)
        for fault in ('no operator Det', "mode b'cubic'",
                      'x has no fixed size'):
            assert fault in said
        assert ('opset 21' in said) == (opset == 21)


def test_bad_input_leaves_no_folder(stock, tmp_path, capsys, monkeypatch):
    out = str(tmp_path / 'out')
    state = torch.load(stock.weights, weights_only=True)['state_dict']
    bias = state['decode_head.conv_seg.bias']
    nan = {'decode_head.conv_seg.bias': bias * float('nan')}
    text = {'decode_head.conv_seg.text.class_embeddings': torch.ones(8, 4)}
    for name, change in (('nan', nan), ('text', text)):
        torch.save({**state, **change}, stock.out / f'{name}.pth')
    text_config, = CONFIGS.glob(
        'text_classifier/textkd_bisenetv2*toyclip*scenes*.py')
    camvid, = CONFIGS.glob('stock/bisenetv2*camvid*.py')
    empty = stock.out / 'empty'
    empty.mkdir()
    ddrnet, = CONFIGS.glob('stock/ddrnet_23-slim*camvid*.py')
    network = revert_sync_batchnorm(MODELS.build(load_model(ddrnet)))
    torch.save(network.state_dict(), stock.out / 'ddrnet.pth')
    ddrnet = str(ddrnet), str(stock.out / 'ddrnet.pth')
    cfg = Config.fromfile(stock.config)
    cfg.val_dataloader.dataset.metainfo.classes = CLASSES[::-1]
    other = str(stock.out / 'other.py')
    cfg.dump(other)
    monkeypatch.setitem(sys.modules, 'ncnn', None)  # not installed
    int8 = '--precision', 'int8', '--calibrate'
    for message, config, weights, *options in [
        ('not of the network', str(text_config), stock.weights),
        ('give its own config', stock.config, str(stock.out / 'text.pth')),
        ('gone.pth', stock.config, 'gone.pth'),
        ('gone.py', 'gone.py', stock.weights),
        ('NaN', stock.config, str(stock.out / 'nan.pth')),
        ('not of the network', str(camvid), stock.weights),
        ('is no checkpoint', stock.config, stock.config),
        ('does not run at 30x50.*Take --size 32 56', *ddrnet, '--size', '30',
         '50'),
        ('there are no images', *stock[:2], '--images', str(empty)),
        ('there are no images', *stock[:2], *int8, str(empty)),
        ('other classes', *stock[:2], '--eval', other),
        ('pip install -r requirements/ncnn.txt', *stock[:2], '--to', 'ncnn'),
        ('tensorrt has no int8', *stock[:2], '--to', 'tensorrt', *int8,
         str(stock.images)),
        ('takes one size', *stock[:2], '--to', 'tensorrt', '--dynamic'),
    ]:
        with pytest.raises(SystemExit, match=message):
            deploy.main(
                [config, weights, '--out', out, '--to', 'onnx', *options])
    for message, target in [('no folder', str(tmp_path / 'a/b')),
                            ('exists', str(empty))]:
        with pytest.raises(SystemExit, match=message):
            deploy.main([*stock[:2], '--out', target, '--to', 'onnx'])
    for message, *options in [
        ('at least 18', '--opset', '17'),
        ('must be positive', '--size', '0', '8'),
        ('go together', '--precision', 'int8'),
        ('takes no bytes', '--to', 'ncnn', '--preprocess'),
    ]:
        with pytest.raises(SystemExit):
            deploy.main([*stock[:2], '--out', out, '--to', 'onnx', *options])
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) and not list(empty.iterdir())


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
    out = tmp_path / 'kept'
    deploy.main([
        str(config),
        str(weights), '--out',
        str(out), '--to', 'onnx', '--dynamic', '--no-preprocess'
    ])
    for size in (32, 64), (40, 56):
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = trained.encode_decode(image, [dict(img_shape=size)])
        logits = torch.from_numpy(onnx_run(out, image.numpy()))
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
