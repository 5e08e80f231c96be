# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What runs a deployed folder: run.py alone, demo/cpp, the runtimes."""
import hashlib
import importlib.util
import json
import re
import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
from mmseg.registry import MODELS
from onnx import TensorProto, helper
from processes import ALONE, start
from tiny import tiny_config, write_video
from tool_modules import ROOT, call, fails, load_tool

from mmseg_textkd.deploy import run as tool
from mmseg_textkd.deploy.runtimes import RUNTIMES

CLASSES = ('blue', 'green', 'red')
PALETTE = np.array([[200, 10, 30], [20, 60, 220], [90, 160, 0]])  # RGB
SIZE = (48, 96)
ALONE = ALONE.format(script='net/run.py')


def save_graph(folder, preprocess=None, size=('height', 'width')):
    """Deploy a network by hand: the class is the largest channel."""
    folder.mkdir()
    make, byte, real = helper.make_node, TensorProto.UINT8, TensorProto.FLOAT
    if preprocess is None:
        nodes = [
            make('Cast', ['image'], ['x'], to=real),
            make('ArgMax', ['x'], ['y'], axis=3, keepdims=0),
            make('Cast', ['y'], ['labels'], to=byte)
        ]
        ends = ('image', byte, [1, *size, 3]), ('labels', byte, [1, *size])
    else:
        nodes = [make('Identity', ['image'], ['logits'])]
        shape = [1, 3, *size]
        ends = ('image', real, shape), ('logits', real, shape)
    ends = [[helper.make_tensor_value_info(*end)] for end in ends]
    graph = helper.make_graph(nodes, 'by hand', *ends)
    opsets = [helper.make_opsetid('', 20)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    data = model.SerializeToString()
    (folder / 'model.onnx').write_bytes(data)
    meta = dict(runtime='onnx', needs='onnxruntime', precision='fp32')
    meta.update(preprocess=preprocess)
    meta['size'] = None if isinstance(size[0], str) else size
    meta['sha256'] = {'model.onnx': hashlib.sha256(data).hexdigest()}
    (folder / 'network.json').write_text(json.dumps(meta))
    rows = (' '.join(map(str, [*color, name]))
            for color, name in zip(PALETTE, CLASSES))
    (folder / 'classes.txt').write_text('\n'.join(rows))
    shutil.copy(tool.__file__, folder)
    return folder


@pytest.fixture
def model(tmp_path):
    return save_graph(tmp_path / 'net')


def picture(seed=0):
    """Large areas of blue, green and red, with noise."""
    rng = np.random.default_rng(seed)
    areas = np.eye(3)[rng.integers(0, 3, (2, 4))].repeat(24, 0).repeat(24, 1)
    noise = rng.integers(0, 50, (*SIZE, 3))
    return (areas * 150 + noise).astype(np.uint8)


def blend(image, opacity):
    """What the image and its classes give together."""
    colors = PALETTE[image.argmax(2)][..., ::-1]
    return ((1 - opacity) * image + opacity * colors).astype(np.uint8)


def test_picture_in_a_process_without_torch(model, tmp_path):
    image = picture()
    cv2.imwrite(str(tmp_path / 'in.png'), image)
    words = 'python', '-c', ALONE, 'in.png', '--out', 'out.png'
    done = start(*words, '--opacity', '0.25', cwd=str(tmp_path))
    assert done.status == 0, done.output
    assert re.match(
        r'1 images: [\d.]+ fps with reading.*alone [\d.]+ fps \(median\)\n$',
        done.output)
    shown = cv2.imread(str(tmp_path / 'out.png'))
    assert np.array_equal(shown[:, :96], blend(image, 0.25))
    # The legend: the classes that are there, the most frequent first.
    counts = np.bincount(image.argmax(2).ravel(), minlength=3)
    order = np.argsort(-counts, kind='stable')[:2]
    assert counts[order].all()
    patches = shown[[11, 33], 96 + 18]
    assert np.array_equal(patches[:, ::-1], PALETTE[order])
    # Beside each color stands something.
    assert all((shown[row:row + 22, 96 + 36:] < 128).any() for row in (0, 22))
    # With torch it would have failed.
    code = ALONE.replace('runpy.run_path', 'import torch; runpy.run_path')
    done = start('python', '-c', code, cwd=str(tmp_path))
    assert done.status and 'torch is not installed here' in done.output
    # A large image is refused.
    (tmp_path / 'out.png').unlink()
    bound = str(48 * 96 - 1)
    done = start(*words, cwd=str(tmp_path), OPENCV_IO_MAX_IMAGE_PIXELS=bound)
    assert done.status == 1 and not (tmp_path / 'out.png').exists()
    assert 'in.png cannot be read as an image of at most 4607' in done.output


def test_folder(model, tmp_path):
    inputs, out = tmp_path / 'in', tmp_path / 'new' / 'folder'
    inputs.mkdir()
    (inputs / 'notes.txt').write_text('no picture')
    names = 'a.png', 'b.png', 'c.bmp'
    for seed, name in enumerate(names):
        cv2.imwrite(str(inputs / name), picture(seed))
    call(tool, '--folder', model, inputs, '--out', out)
    assert sorted(p.name for p in out.iterdir()) == list(names)
    for seed, name in enumerate(names):
        shown = cv2.imread(str(out / name))[:, :96]
        assert np.array_equal(shown, blend(picture(seed), 0.5))


def test_video_round_trip(model, tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ('in.avi', 'out.avi')]
    write_video(paths[0], [picture(seed) for seed in range(3)], 10)
    call(tool, '--folder', model, paths[0], '--out', paths[1])
    assert capsys.readouterr().out.startswith('3 images: ')
    before, after = map(cv2.VideoCapture, paths)
    assert after.get(cv2.CAP_PROP_FPS) == 10
    for _ in range(3):
        image, shown = before.read()[1], after.read()[1]
        assert shown.shape == (48, 96 + 160, 3)
        # The file is lossy.
        difference = shown[:, :96].astype(int) - blend(image, 0.5)
        assert np.abs(difference).mean() < 12
    assert not after.read()[0]


def test_graph_that_takes_normalized_input(tmp_path):
    spec = dict(mean=[100., 0., 0.], std=[1., 2., 1.], swap_channels=True)
    network = tool.Network(save_graph(tmp_path / 'a', preprocess=spec))
    image = picture()
    scores = (image[..., ::-1] - [100, 0, 0]) / [1, 2, 1]
    assert len(np.unique(scores.argmax(2))) == 3
    assert np.array_equal(network(image), scores.argmax(2))


def test_graph_of_one_size_sees_resized_images(tmp_path):
    network = tool.Network(save_graph(tmp_path / 'a', size=(24, 48)))
    image = np.kron(picture()[::24, ::24], np.ones((24, 24, 1), np.uint8))
    assert np.array_equal(network(image), image.argmax(2))


def test_errors(model, tmp_path, capsys, monkeypatch):
    image, out, bad = (tmp_path / f'{n}.png' for n in ('in', 'out', 'bad'))
    cv2.imwrite(str(image), picture())
    net, to, size = ('--folder', model), ('--out', out), ('height', 8)
    fixed = save_graph(tmp_path / 'fixed', size=size)
    damaged, other = save_graph(tmp_path / 'a'), save_graph(tmp_path / 'b')
    (damaged / 'model.onnx').write_bytes(b'x')
    meta = json.loads((other / 'network.json').read_text())
    meta.update(runtime='ncnn', needs='ncnn')
    (other / 'network.json').write_text(json.dumps(meta))
    monkeypatch.setitem(sys.modules, 'ncnn', None)  # not installed
    empty = tmp_path / 'empty'
    empty.mkdir()
    bad.write_text('x')
    for message, *words in [
        ('is no folder of', '--folder', empty, image, *to),
        ('is damaged', '--folder', damaged, image, *to),
        ('for ncnn.*pip install ncnn', '--folder', other, image, *to),
        ('no images in', *net, empty, *to),
        ('cannot be read as an image', *net, bad, *to),
        ('does not take 48x96.*--size H W', '--folder', fixed, image, *to),
        ('cannot open .*gone.mp4', *net, 'gone.mp4', '--out', 'out.mp4'),
        ('cannot open 99', *net, '--webcam', 99, '--out', 'out.mp4'),
        ('cannot write', *net, image, '--out', empty / 'no/a.png'),
    ]:
        said = fails(tool, capsys, *words)
        assert re.search(f'Error: .*{message}', said), said
    for message, *words in [
        ('one of them', *to),
        ('one of them', image, '--webcam', *to),
        ('--out, --show or both', image),
        ('--opacity', image, *to, '--opacity', 2),
    ]:
        assert message in fails(tool, capsys, *words)
    assert not out.exists() and not list(empty.iterdir())


def test_input_is_never_written_over(model, tmp_path, capsys):
    image, video = tmp_path / 'a.png', tmp_path / 'a.avi'
    link = tmp_path / 'link.png'
    cv2.imwrite(str(image), picture())
    video.write_bytes(b'video')
    link.symlink_to(image)
    before = image.read_bytes()
    for source, out in ((image, image), (link, image),
                        (tmp_path, tmp_path / '.'), (video, video)):
        said = fails(tool, capsys, '--folder', model, source, '--out', out)
        assert 'would write over the input' in said
    assert image.read_bytes() == before and video.read_bytes() == b'video'


needed = [name for name in ('cmake', 'c++') if shutil.which(name) is None]
needed += ['openvino'] * (importlib.util.find_spec('openvino') is None)


@pytest.mark.runtimes
@pytest.mark.skipif(bool(needed), reason=f'{", ".join(needed)} not installed')
def test_cpp_shows_what_python_predicts(tmp_path):
    import openvino.utils
    cfg, weights = tiny_config(tmp_path), tmp_path / 'model.pth'
    network = MODELS.build(cfg.model)
    network.decode_head.conv_seg.weight.data.normal_()
    cfg.dump(tmp_path / 'cfg.py')
    torch.save(network.state_dict(), weights)
    call('deployment/deploy.py', tmp_path / 'cfg.py', weights, '--out',
         tmp_path / 'net', '--to', 'openvino')
    build = str(tmp_path / 'build')
    cmake = openvino.utils.get_cmake_path()
    make = '-S', f'{ROOT}/demo/cpp', '-B', build, f'-DOpenVINO_DIR={cmake}'
    for words in (make, ('--build', build)):
        done = start('cmake', *words, cwd=str(tmp_path))
        assert done.status == 0, done.output

    def segment(*words):
        return start(f'{build}/segment', *words, cwd=str(tmp_path))

    image = cv2.imread(str(tmp_path / 'data' / 'img' / '0.png'))
    cv2.imwrite(str(tmp_path / 'in.ppm'), image)
    done = segment('net', 'in.ppm', 'out.ppm')
    assert done.status == 0, done.output
    network = tool.Network(tmp_path / 'net')
    labels = network(image)
    counts = np.bincount(labels.ravel())
    assert (counts > 0).sum() > 1
    shown = cv2.imread(str(tmp_path / 'out.ppm'))
    assert np.array_equal(shown, network.colors[labels])
    said = [f'{network.classes[k]} {n}' for k, n in enumerate(counts) if n]
    assert done.output.split('\n')[1:-1] == said
    # Comments, as GIMP writes them, and other blanks.
    data = (tmp_path / 'in.ppm').read_bytes()
    assert data.startswith(b'P6\n64 32\n255\n')
    (tmp_path /
     'in.ppm').write_bytes(b'P6\n# by hand\n64\t32 # wide\n#\n255\n' +
                           data[13:])
    again = segment('net', 'in.ppm', 'out.ppm')
    assert again.output.split('\n')[1:-1] == said
    # An image of another size is resized, and so is what is predicted.
    large = np.kron(image, np.ones((2, 2, 1), np.uint8))
    cv2.imwrite(str(tmp_path / 'large.ppm'), large)
    assert segment('net', 'large.ppm', 'large_out.ppm').status == 0
    shown = cv2.imread(str(tmp_path / 'large_out.ppm'))
    assert shown.shape == (64, 128, 3)
    assert (shown[::2, ::2] == network.colors[labels]).all(2).mean() > .9
    (tmp_path / 'in.ppm').write_bytes(b'P6 64 32 255\n')
    for message, *words in [('in.ppm is cut short', 'net', 'in.ppm', 'no'),
                            ('is no binary PPM', 'net', 'net/run.py', 'no'),
                            ('names no classes', 'gone', 'in.ppm', 'no'),
                            ('usage', 'net')]:
        done = segment(*words)
        assert done.status and message in done.output
    assert not (tmp_path / 'no').exists()


def test_cells_of_the_page_say_what_the_folders_say(tmp_path):
    runtimes = load_tool('analysis_tools/runtimes.py')
    found = dict(difference=2e-5, largest=10., differing=0, pixels=1000)
    for runtime, differing in ('ncnn', 0), ('onnx', 25):
        path = tmp_path / f'fast_scnn_{runtime}_fp32'
        path.mkdir()
        checks = [dict(found, differing=differing)]
        (path / 'network.json').write_text(json.dumps(dict(checks=checks)))
    argv = ['--work-dir', str(tmp_path), '--out', str(tmp_path / 'page.md')]
    args = runtimes.complete(runtimes.parse_args(argv))
    assert args.cells == runtimes.CELLS and len(args.networks) == 15
    text = runtimes.page(args, None)
    header, _, *rows = [r for r in text.splitlines() if r.startswith('|')]
    assert header == '| network | onnx fp32 | ncnn fp32 |'
    assert '| fast_scnn | 2.0e-06, 97.50 % | 2.0e-06 |' in rows
    assert '| pidnet-s |  |  |' in rows and len(rows) == 15
    times = dict(
        ratio=.5, to_stock=1.001, to_stock_ci95=[.99, 1.01], share_of_peak=.42)
    arms = {'eager': {}, 'ncnn fp32': times, 'ncnn fp32 stock': {}}
    results = dict(rows=[dict(network='fast_scnn', arms=arms)])
    row = 'ncnn fp32', '0.500', '1.001 [0.990, 1.010]', '42 %'
    assert runtimes.time_rows(results) == [('fast_scnn', *row)]


@pytest.mark.runtimes
def test_segnext_in_openvino(tmp_path):
    """Its compiler ended the process on the graph that it traced itself."""
    pytest.importorskip('openvino')
    tool = f'{ROOT}/tools/analysis_tools/runtimes.py'
    words = ('--networks segnext_mscan-t --cells openvino:fp32 --size 64 128 '
             '--num-images 1 --work-dir folders --out page.md').split()
    done = start('python', tool, *words, cwd=str(tmp_path), fork=False)
    assert done.status == 0, done.output
    page = (tmp_path / 'page.md').read_text()
    row, = (row for row in page.split('\n') if 'segnext' in row)
    assert float(row.split('|')[2].split(',')[0]) < 1e-4


def test_networks_ran_in_float32_and_are_near():
    """The page that is shipped; an empty cell has not been run."""
    page = (ROOT / 'docs' / 'en' / 'runtimes.md').read_text(encoding='utf-8')
    lines = page.split('## Time')[0].split('\n')
    rows = [row.split('|')[1:-1] for row in lines if row.startswith('|')]
    columns = {}
    for name, _, *cells in zip(*rows):
        cells = [cell.split(',')[0].strip() for cell in cells]
        columns[name.strip()] = [*filter(None, cells)]
    assert len(columns['network']) == 15
    for runtime in RUNTIMES:
        cells = columns.get(f'{runtime} fp32', [])
        least = 5 if runtime in ('litert', 'executorch') else 15
        # TorchScript is what PyTorch itself runs.
        assert len(cells) >= least or runtime == 'torchscript'
        assert all(float(cell) < 1e-4 for cell in cells)
