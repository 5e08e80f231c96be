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
from types import SimpleNamespace

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmseg.apis import inference_model, init_model
from mmseg.registry import MODELS
from network_tester import CONFIGS, load_model
from processes import ALONE, start
from tiny import (CLASSES, CONTROL, predict_logits, run, save_weights,
                  tiny_config)
from tool_modules import call, fails, load_tool
from torch import nn

from mmseg_textkd.deploy import fold_state_dict, int8, tensorrt, to_stock_cfg
from mmseg_textkd.deploy.adaptive_pool import MatrixAdaptiveAvgPool2d
from mmseg_textkd.deploy.export import to_onnx
from mmseg_textkd.deploy.export_check import check
from mmseg_textkd.deploy.exportable import ExportableSegmentor
from mmseg_textkd.deploy.folder import deploy as deploy_network
from mmseg_textkd.deploy.load_stock import load_stock
from mmseg_textkd.deploy.run import Network
from mmseg_textkd.deploy.runtimes import RUNTIMES, Form, half_precision

deploy = load_tool('deployment/deploy.py')
PALETTE = [[i * 30, 255 - i * 30, 7 * i] for i in range(len(CLASSES))]


@pytest.fixture(scope='module')
def stock(tmp_path_factory):
    """A tiny stock network, trained, with an auxiliary head."""
    root = tmp_path_factory.mktemp('stock')
    cfg = tiny_config(root, max_iters=40)
    cfg.optim_wrapper.optimizer.lr = .5
    cfg.model.auxiliary_head = copy.deepcopy(cfg.model.decode_head)
    # To advise on sizes, `resize` then turns them into numbers.
    cfg.model.decode_head.align_corners = True
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.metainfo.palette = PALETTE
    kinds = 'LoadImageFromFile', 'PackSegInputs'
    cfg.test_pipeline = [dict(type=kind) for kind in kinds]
    runner = run(cfg)
    evaluator = dict(cfg.val_evaluator, type='mmseg.IoUMetric')
    cfg.val_evaluator = [dict(type='DepthMetric'), evaluator]
    # As 'bed ' of ADE20K.
    names = [f'{CLASSES[0]} ', *CLASSES[1:]]
    cfg.val_dataloader.dataset.metainfo.classes = names
    cfg.dump(root / 'config.py')
    files = f'{root}/config.py', f'{root}/work/iter_40.pth'
    return SimpleNamespace(
        files=files,
        config=files[0],
        weights=files[1],
        model=init_model(*files, device='cpu'),
        images=root / 'data' / 'img',
        miou=runner.val_loop.run()['mIoU'],
        out=root,
        said={})


@pytest.fixture(scope='module')
def export(stock):
    """Get a function that exports it; returns the folder, made once."""

    def export(name, *options, to='onnx'):
        out = stock.out / name
        if not out.exists():
            words = *stock.files, '--out', out, '--to', to, *options
            with redirect_stdout(StringIO()) as said:
                call(deploy, *words)
            stock.said[name] = said.getvalue()
        return out

    return export


def export_logits(export):
    return export('logits', '--dynamic', '--no-preprocess')


def export_labels(stock, export):
    return export('labels', '--output', 'argmax', '--images', stock.images)


def read(path):
    return json.loads((path / 'network.json').read_text())


def onnx_run(path, image):
    session = onnxruntime.InferenceSession(
        str(path / 'model.onnx'), providers=['CPUExecutionProvider'])
    return session.run(None, {'image': image})[0]


@pytest.mark.stacks
def test_logits_at_any_size(stock, export):
    for size in ((32, 64), (50, 34), (97, 131)):
        image = torch.randn(1, 3, *size)
        expected = predict_logits(stock.model, image)
        got = torch.from_numpy(onnx_run(export_logits(export), image.numpy()))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(got.argmax(1), expected.argmax(1))


@pytest.mark.stacks
def test_labels_of_an_image_are_those_of_mmsegmentation(stock, export):
    for path in sorted(stock.images.iterdir()):
        image = cv2.imread(str(path))
        expected = inference_model(stock.model, image).pred_sem_seg.data
        got = onnx_run(export_labels(stock, export), image[None])
        assert got.dtype == np.uint8 and len(expected.unique()) > 2
        assert np.array_equal(got, expected)


def test_folder_and_tool_say_what_it_is(stock, export):
    folder = export_labels(stock, export)
    export_logits(export)
    # The tool, how near it comes; what it says of each: see the check.
    assert re.match(
        'Only random inputs .*\nrandom 32x64: .*\nrandom 55x105: .*another '
        r'class at 0 of 5775 pixels\nwrote .*logits: onnx, fp32, logits, 0\.'
        r'\d+ MB', stock.said['logits'])
    assert re.match(
        'random 32x64: another class at 0 of 2048 pixels\n'
        f'6 images of {stock.images}: another class at 0 of 12288 pixels\n'
        r'wrote .*labels: onnx, fp32, argmax, 0\.\d+ MB', stock.said['labels'])
    names = 'README.md', 'classes.txt', 'model.onnx', 'network.json', 'run.py'
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)
    meta, data = read(folder), (folder / 'model.onnx').read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    assert meta['sha256'] == {'model.onnx': sha256}
    assert meta['size'] == [32, 64] and meta['preprocess'] is None
    shape = [1, 32, 64, 3]
    assert meta['input'] == dict(shape=shape, dtype='uint8', layout='NHWC')
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
    meta, spec = read(export_logits(export)), dict(mean=[128.] * 3)
    spec.update(std=[64.] * 3, swap_channels=False)
    assert meta['size'] is None and meta['preprocess'] == spec


@pytest.mark.stacks
def test_torchscript(stock, export):
    out, found = export('script', '--dynamic', to='torchscript'), {}
    found['mmseg_textkd.json'] = ''
    loaded = torch.jit.load(str(out / 'model.pt'), _extra_files=found)
    assert json.loads(found['mmseg_textkd.json'])['classes'] == list(CLASSES)
    for size in ((32, 64), (45, 70)):
        image = torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8)
        expected = inference_model(stock.model, image[0].numpy())
        torch.testing.assert_close(
            loaded(image)[0], expected.seg_logits.data, rtol=1e-4, atol=1e-4)


def runtime(name, *modules):
    """A runtime, skipped with the reason where it is not installed."""
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    reason = f'{", ".join(missing)} not installed'
    return pytest.param(
        name, marks=pytest.mark.skipif(bool(missing), reason=reason))


@pytest.mark.runtimes
@pytest.mark.parametrize('name', [
    runtime('openvino', 'openvino'),
    runtime('ncnn', 'ncnn', 'pnnx'),
    runtime('litert', 'litert_torch'),
    runtime('executorch', 'executorch'),
    runtime('tensorrt')
])
def test_runtime_predicts_what_mmsegmentation_does(stock, export, name):
    """The folder is read as a user reads it."""
    options = '--images', stock.images, '--eval', stock.config
    out = export(name, *options, to=name)
    network = Network(out, threads=1)
    for path in sorted(stock.images.iterdir()):
        image = cv2.imread(str(path))
        expected = inference_model(stock.model, image)
        scores = expected.seg_logits.data[None].numpy()
        got = network.predict(network.inputs(image))
        bound = 1e-4 * np.abs(scores).max()
        np.testing.assert_allclose(got, scores, rtol=0, atol=bound)
        assert np.array_equal(network(image), expected.pred_sem_seg.data[0])
    assert round(read(out)['mIoU'], 2) == round(stock.miou, 2)
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
def test_int8_stays_near(stock, export, name):
    images = '--calibrate', stock.images, '--eval', stock.config
    out = export(f'int8-{name}', '--precision', 'int8', *images, to=name)
    network = Network(out)
    images = [cv2.imread(str(path)) for path in stock.images.iterdir()]
    found = [inference_model(stock.model, image) for image in images]
    expected = np.stack([x.pred_sem_seg.data[0] for x in found])
    got = np.stack([network(image) for image in images])
    # Of a network that has hardly learned; the mIoU below is what counts.
    assert (got == expected).mean() > .9
    meta = read(out)
    assert round(meta['mIoU_fp32'], 2) == round(stock.miou, 2)
    # Layers would have stayed in float32 otherwise, all of them in the end.
    assert meta['mIoU_fp32'] - meta['mIoU'] <= 1
    assert meta['float32_layers']
    weight = stock.model.decode_head.conv_seg.weight.detach().numpy()
    if name == 'onnx':
        graph = onnx.load(out / 'model.onnx').graph
        kinds = {node.op_type for node in graph.node}
        assert {'QuantizeLinear', 'DequantizeLinear'} <= kinds
        # The classifier has its weights as they were.
        tensors = map(onnx.numpy_helper.to_array, graph.initializer)
        assert any(np.array_equal(tensor, weight) for tensor in tensors)
    else:
        assert 'FakeQuantize' in (out / 'model.xml').read_text()


@pytest.mark.parametrize('activation', ['ReLU', 'ReLU6'])
def test_int8_ranges_are_those_after_the_activation(activation):
    """Extremes that it cuts off do not widen the steps; none saturate."""
    layers = nn.Conv2d(3, 16, 3), getattr(nn, activation)()
    net = nn.Sequential(*layers, nn.Conv2d(16, 4, 1))
    # Channels that it cuts off, at either end.
    nn.init.constant_(net[0].bias[:4], -200)
    if activation == 'ReLU6':
        nn.init.constant_(net[0].bias[4:8], 200)
    inputs, file = torch.randn(4, 3, 16, 16), BytesIO()
    torch.onnx.export(
        net, inputs[:1], file, input_names=['image'], dynamo=False)
    arrays = [x[None].numpy() for x in inputs]
    files = int8.onnx_int8({'model.onnx': file.getvalue()}, arrays, [])
    session = onnxruntime.InferenceSession(files['model.onnx'])
    got = np.concatenate([session.run(None, {'image': x})[0] for x in arrays])
    expected = net(inputs).detach().numpy()
    spread = np.abs(expected - expected.mean((0, 2, 3), keepdims=True)).max()
    assert np.abs(got - expected).max() < .1 * spread


def test_int8_of_a_product_with_a_stack_of_matrices():
    """As in SegNeXt's head; it stays in float32."""

    class Net(nn.Conv2d):

        def forward(self, x):
            bases = torch.arange(16.).reshape(1, 4, 4) / 16
            pixels = super().forward(x).flatten(2)
            shares = pixels.transpose(1, 2) @ bases
            return bases @ (pixels @ shares)

    net, inputs, file = Net(3, 4, 3).eval(), torch.randn(2, 3, 8, 9), BytesIO()
    torch.onnx.export(
        net, inputs[:1], file, input_names=['image'], dynamo=False)
    arrays = [x[None].numpy() for x in inputs]
    files = int8.onnx_int8({'model.onnx': file.getvalue()}, arrays, [])
    session = onnxruntime.InferenceSession(files['model.onnx'])
    got, = session.run(None, dict(image=arrays[0]))
    expected = net(inputs[:1]).detach().numpy()
    assert 0 < np.abs(got - expected).max() < .05 * np.abs(expected).max()


@pytest.mark.parametrize('name', ['onnx', runtime('openvino', 'openvino')])
def test_half_precision(export, name):
    out = export(f'half-{name}', '--precision', 'fp16', to=name)
    found, = read(out)['checks']
    assert 0 < found['difference'] < .01 * found['largest']
    weights = 'model.onnx' if name == 'onnx' else 'model.bin'
    # Against the same network in float32; the graph itself stays.
    whole = export(f'whole-{name}', to=name)
    saved = (whole / weights).stat().st_size - (out / weights).stat().st_size
    assert saved > .8 * 2 * read(out)['params']


def test_half_precision_of_two_resizes_by_one_factor():
    """As in ICNet; the factor stays in float32."""

    class Net(nn.Conv2d):

        def forward(self, x):
            return [
                F.interpolate(y, scale_factor=.5, mode='bilinear')
                for y in (x, super().forward(x))
            ]

    net, inputs = Net(3, 4, 3).eval(), torch.randn(1, 3, 8, 10)
    graph = torch.onnx.export(
        net, (inputs, ), input_names=['image'], dynamo=True).model_proto
    session = onnxruntime.InferenceSession(
        half_precision(graph.SerializeToString()))
    for got, expected in zip(
            session.run(None, dict(image=inputs.numpy())), net(inputs)):
        assert np.abs(got - expected.detach().numpy()).max() < .01


def test_names_of_the_tool_are_those_of_the_package():
    """It names them itself, for `--help` comes before what takes time."""
    assert deploy.NAMES == tuple(RUNTIMES)
    normalized = [k for k, v in RUNTIMES.items() if not v.preprocess]
    assert deploy.NORMALIZED == tuple(normalized)


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


@pytest.mark.parametrize('opset', [20, 21])
def test_tensorrt_refuses_what_it_lacks(opset):
    """Operators, modes, sizes and opset, all in one message."""
    make = onnx.helper
    x, y = (make.make_tensor_value_info(name, 1, shape)
            for name, shape in (('x', [1, 3, 'h', 8]), ('y', None)))
    nodes = [
        make.make_node('Resize', ['x', '', 's'], ['a'], mode='cubic'),
        make.make_node('Det', ['a'], ['y'])
    ]
    scales = onnx.numpy_helper.from_array(np.float32([1, 1, 2, 2]), 's')
    graph = make.make_graph(nodes, 'g', [x], [y], [scales])
    opsets = [make.make_opsetid('', opset)]
    model = make.make_model(graph, opset_imports=opsets, ir_version=10)
    with pytest.raises(ValueError) as error:
        tensorrt.check_graph(model.SerializeToString())
    said = str(error.value)
    for fault in ('no operator Det', "mode b'cubic'", 'x has no fixed size'):
        assert fault in said
    assert ('opset 21' in said) == (opset == 21)


def test_calibration_sees_the_whole_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / 'in').mkdir()
    for k in range(19):
        (tmp_path / 'in' / f'{k:02}.png').touch()
    seen = []
    monkeypatch.setattr(deploy, 'check_image',
                        lambda path, most: seen.append(path.stem))
    fails(deploy, capsys, 'gone.py', 'gone.pth', '--out', tmp_path / 'out',
          '--to', 'onnx', '--precision', 'int8', '--calibrate',
          tmp_path / 'in', '--num-images', 10)
    assert len(seen) == 10 and seen[0] == '00' and seen[-1] >= '17'


def test_bad_input_leaves_no_folder(stock, tmp_path, capsys, monkeypatch):
    files, out, empty = stock.files, tmp_path / 'out', stock.out / 'empty'
    empty.mkdir()
    state = torch.load(stock.weights, weights_only=True)['state_dict']
    bias = state['decode_head.conv_seg.bias']
    nan = {'decode_head.conv_seg.bias': bias * float('nan')}
    text = {'decode_head.conv_seg.text.class_embeddings': torch.ones(8, 4)}
    for name, change in (('nan', nan), ('text', text)):
        torch.save({**state, **change}, stock.out / f'{name}.pth')
    names = ('text_classifier/textkd_bisenetv2*toyclip*scenes*.py',
             'stock/bisenetv2*camvid*.py', 'stock/ddrnet_23-slim*camvid*.py')
    text_config, camvid, ddrnet = (next(CONFIGS.glob(name)) for name in names)
    network = revert_sync_batchnorm(MODELS.build(load_model(ddrnet)))
    torch.save(network.state_dict(), stock.out / 'ddrnet.pth')
    ddrnet = ddrnet, stock.out / 'ddrnet.pth'
    cfg = Config.fromfile(stock.config)
    cfg.val_dataloader.dataset.metainfo.classes = CLASSES[::-1]
    cfg.dump(stock.out / 'other.py')
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.dump(stock.out / 'noval.py')
    monkeypatch.setitem(sys.modules, 'ncnn', None)  # not installed
    int8, trt = ('--precision', 'int8', '--calibrate'), ('--to', 'tensorrt')
    for message, *words in [
        ('not of the network', text_config, stock.weights),
        ('give its own config', stock.config, stock.out / 'text.pth'),
        ('gone.pth', stock.config, 'gone.pth'),
        ('gone.py', 'gone.py', stock.weights),
        ('NaN', stock.config, stock.out / 'nan.pth'),
        ('not of the network', camvid, stock.weights),
        ('is no checkpoint', stock.config, stock.config),
        ('does not run at 30x50.*Take --size 32 56', *ddrnet, '--size', 30,
         50),
        ('there are no images', *files, '--images', empty),
        ('there are no images', *files, *int8, empty),
        ('other classes', *files, '--eval', stock.out / 'other.py'),
        ('has no val_dataloader', stock.config, 'gone.pth', '--eval',
         stock.out / 'noval.py'),
        ('pip install -r requirements/ncnn.txt', *files, '--to', 'ncnn'),
        ('tensorrt has no int8', *files, *trt, *int8, stock.images),
        ('takes one size', *files, *trt, '--dynamic'),
        ('no folder', *files, '--out', tmp_path / 'a/b'),
        ('exists', *files, '--out', empty),
        ('at least 18', *files, '--opset', 17),
        ('must be positive', *files, '--size', 0, 8),
        ('go together', *files, '--precision', 'int8'),
        ('takes no bytes', *files, '--to', 'ncnn', '--preprocess'),
    ]:
        config, weights, *options = words
        words = config, weights, '--out', out, '--to', 'onnx', *options
        assert re.search(message, fails(deploy, capsys, *words))
    assert not list(tmp_path.iterdir()) and not list(empty.iterdir())


def test_lseg_exports_with_its_norm_and_its_blocks(tmp_path):
    """As `textkd2mmseg.py --l2 keep` writes it; text and plugin are gone."""
    cfg, out = tiny_config(tmp_path, CONTROL), tmp_path / 'kept'
    cfg.model.decode_head.text_branch = dict(
        norm='l2', bias=False, regularization=dict(depth=2))
    trained = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        blocks = trained.decode_head.text.regularization
        blocks.weight.add_(.3 * torch.randn(2, 3, 3))
    to_stock_cfg(cfg, keep_l2=True).dump(tmp_path / 'kept.py')
    state = fold_state_dict(trained, keep_l2=True)
    weights = save_weights(tmp_path / 'kept.pth', state)
    call(deploy, tmp_path / 'kept.py', weights, '--out', out, '--to', 'onnx',
         '--dynamic', '--no-preprocess')
    for size in (32, 64), (40, 56):
        image = torch.randn(1, 3, *size)
        expected = predict_logits(trained, image)
        logits = torch.from_numpy(onnx_run(out, image.numpy()))
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


# What is particular: pooling to bins that do not divide; padding in testing
# and random numbers.
@each_case('name, options, size', [
    ('fast_scnn', ['--dynamic', '--no-preprocess'], (70, 102)),
    ('segnext_mscan-t', ['--output', 'probabilities', '--dynamic'], (50, 75)),
])
def test_networks(name, options, size, tmp_path):
    path, = CONFIGS.glob(f'stock/{name}*camvid-360*.py')
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
    files, out = (tmp_path / 'cfg.py', tmp_path / 'model.pth'), tmp_path / 'o'
    call('deployment/deploy.py', *files, '--out', out, '--to', 'onnx',
         '--size', 64, 96, *options)
    if 'segnext' in name:
        # By hand: normalized, RGB, padded to multiples of 32, cropped.
        model = load_stock(*map(str, files))[1]
        image = torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8)
        processor = model.data_preprocessor
        inputs = image.permute(0, 3, 1, 2)[:, [2, 1, 0]].float()
        inputs = (inputs - processor.mean) / processor.std
        inputs = F.pad(inputs, (0, 96 - size[1], 0, 64 - size[0]))
        expected = predict_logits(model, inputs)
        expected = expected[..., :size[0], :size[1]].softmax(1)
    else:
        image = torch.randn(1, 3, *size)
        expected = predict_logits(model.eval(), image)
    assert expected.std() > 1e-3
    session = onnxruntime.InferenceSession(
        f'{out}/model.onnx', providers=['CPUExecutionProvider'])
    found, = session.run(None, {'image': image.numpy()})
    found = torch.from_numpy(found)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def model(tmp_path):
    """A tiny network."""
    return MODELS.build(tiny_config(tmp_path).model).eval()


@torch.no_grad()
def test_check_finds_another_network(model):
    same = ExportableSegmentor(copy.deepcopy(model))

    def run_labels(image):
        return same(image).argmax(1).byte()

    network = ExportableSegmentor(model)
    scores = network, same
    labels = (ExportableSegmentor(model, 'argmax'), run_labels)
    images = [same.example((32, 64))]
    found = check('x', *scores, images)
    assert str(found).endswith('; another class at 0 of 2048 pixels')
    assert found.difference == 0 and found.largest > 0
    found = check('x', *labels, images)
    assert str(found) == 'x: another class at 0 of 2048 pixels'
    for other, message in [
        (lambda x: same(x.double()), 'does not run: .*Double'),
        (lambda x: same(x[..., :8]), r'shape .* instead of \(1, 8, 32'),
    ]:
        with pytest.raises(ValueError, match=message):
            check('x', network, other, images)
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
    images = [labels.example((32, 64))]
    said = check('x', labels, lambda image: zeros, images)
    assert str(said) == ('x: another class at 2048 of 2048 pixels, all of '
                         'them ties within what is allowed')


def test_operator_that_does_not_export_is_named(model):
    network = ExportableSegmentor(model)
    for forward, message in [
        (torch.linalg.inv, 'linalg_inv.*--size H W'),
        (lambda x: x[:, :int(x.sum())], 'test_export.py:.*--size H'),
    ]:
        model.encode_decode = lambda inputs, metas: forward(inputs)
        with pytest.raises(ValueError, match=message):
            to_onnx(network, (32, 32), True, '{}')


@each_case('padding', [dict(size=(48, 40)), dict(size_divisor=32)])
def test_padding_in_testing(model, padding):
    image = torch.randint(0, 256, (1, 40, 50, 3), dtype=torch.uint8)
    network = ExportableSegmentor(model, preprocess=True)
    model.data_preprocessor.test_cfg = None
    plain = network(image)
    model.data_preprocessor.test_cfg = padding
    # What MMSegmentation does, padding and cropping included.
    assert torch.equal(network(image), network.reference(image))
    assert plain.shape == (1, 8, 40, 50)
    assert not torch.allclose(network(image), plain, atol=1e-4)


@each_case('padding, dynamic, said', [
    (dict(size_divisor=32), False, '40x50 to 64x64.*--size 64 64'),
    (dict(size=(40, 64)), False, '40x50 to 40x64'),
    (dict(size_divisor=8), True, '--dynamic'),
])
def test_padding_without_the_preprocessing(model, tmp_path, padding, dynamic,
                                           said):
    """It would be left out; what needs none is deployed."""
    model.data_preprocessor.test_cfg = padding
    network, out = ExportableSegmentor(model), tmp_path / 'out'
    classes = dict(classes=CLASSES, palette=[[0, 0, 0]] * 8)
    form = Form((40, 50), dynamic, 'fp32', '{}')
    with pytest.raises(ValueError, match=said):
        deploy_network(out, 'torchscript', network, form, classes, {})
    assert not out.exists()
    form = Form((64, 64), False, 'fp32', '{}')
    if 'size' not in padding:
        deploy_network(out, 'torchscript', network, form, classes, {})
        assert (out / 'run.py').is_file()


@each_case('size, bins', [((7, 11), 1), ((3, 5), 2), ((12, 24), 3),
                          ((7, 11), 6), ((1, 2), 3), ((12, 24), (2, 5))])
def test_pooling_by_matrices(size, bins):
    bins = bins if isinstance(bins, tuple) else (bins, bins)
    x = torch.randn(2, 4, *size)
    expected = F.adaptive_avg_pool2d(x, bins)
    torch.testing.assert_close(MatrixAdaptiveAvgPool2d(bins)(x), expected)
