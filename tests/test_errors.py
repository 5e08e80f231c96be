# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Each error says where it is and what to do: a table of bad input."""
import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import yaml
from each_case import each_case
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmseg.registry import TRANSFORMS
from processes import full_disk
from tiny import RESIDUAL, run, tiny_config
from tool_modules import load_tool

from mmseg_textkd.analysis.compare import compare
from mmseg_textkd.apis import TextSegInferencer
from mmseg_textkd.study import Ledger, Study
from mmseg_textkd.text import TextEmbeddings, Vocabulary
from mmseg_textkd.text.encode_classes import encode_classes
from mmseg_textkd.utils.arguments import read_config
from mmseg_textkd.utils.checkpoint import read_checkpoint
from mmseg_textkd.utils.io import read_image

STUDY = dict(
    name='s',
    baseline='a',
    evaluate=['val'],
    networks=dict(
        n=dict(configs=dict(c='c.py'), iterations=2, val_interval=1)),
    arms=dict(a=dict(config='c')),
    grids=[dict(networks=['n'], arms=['a'], seeds=[0])])


def text(data):
    return lambda path: path.write_bytes(data)


def study(**changes):
    return text(yaml.safe_dump({**STUDY, **changes}).encode())


def network(**changes):
    return study(networks=dict(n={**STUDY['networks']['n'], **changes}))


def seeds(value):
    return study(grids=[dict(STUDY['grids'][0], seeds=value)])


def weights(meta):
    state = dict(a=torch.arange(99.))
    return lambda path: torch.save(dict(state_dict=state, meta=meta), path)


def load_image(path):
    TRANSFORMS.build(dict(type='LoadImageFromFile'))(dict(img_path=str(path)))


def load_labels(path):
    results = dict(img_path='', seg_map_path=str(path), seg_fields=[])
    load = TRANSFORMS.build(dict(type='LoadAnnotations'))
    load(dict(results, reduce_zero_label=False))


# Name of the file, what is in it, who reads it, and what is said.
BAD = [
    ('c.py', text(b'model = dict('), read_config, 'c.py.*print_config'),
    ('c.py', text(b"_base_ = './c.py'"), read_config, 'c.py.*Recursion'),
    ('c.py', text(b'a = 1'), read_config, 'c.py has no network.*inherits'),
    ('l.jsonl', text(b'\xff\xfe\x00'), Ledger, 'l.jsonl.*JSON lines in UTF-8'),
    ('s.yaml', text(b"_base_: s.yaml\nname: s"), Study.load,
     's.yaml is its own `_base_`.*Name another'),
    ('s.yaml', text(b'\xff\xfe\x00'), Study.load, 's.yaml.*YAML in UTF-8'),
    ('s.yaml', seeds(['a']), Study.load, r's.yaml: grid 1: seeds.*\[0, 1, 2]'),
    ('s.yaml', network(val_interval=0), Study.load,
     "s.yaml: network 'n': val_interval must be .* at least 1"),
    ('s.yaml', network(iterations='x'), Study.load, "'n': iterations must be"),
    ('s.yaml', study(name='../s'), Study.load, 's.yaml: name must be of let'),
    ('w.pth', weights(argparse.Namespace()), read_checkpoint,
     'w.pth.*Namespace.*not run'),
    ('i.png', text(b''), load_image,
     'i.png cannot be read as an image.*empty'),
    ('l.png', text(b'\x89PNG junk'), load_labels,
     'l.png cannot be read as a label map.*another kind'),
]


@each_case('name, write, read, said', BAD)
def test_bad_files(tmp_path, name, write, read, said):
    path = tmp_path / name
    write(path)
    with pytest.raises(Exception, match=f'(?s){said}') as error:
        read(path)
    assert isinstance(error.value, ValueError)
    # Nobody is told to read it all the same.
    assert 'weights_only' not in str(error.value)


def test_a_camera_has_no_negative_number(capsys):
    words = ['c.py', 'w.pth', '--webcam', '-5', '--out', 'x.mp4']
    with pytest.raises(SystemExit):
        load_tool('../demo/image_demo.py').parse_args(words)
    assert '--webcam must be' in capsys.readouterr().err


def test_good_files_pass(tmp_path):
    """The table's own good twins, so that it tests what it says."""
    study()(tmp_path / 's.yaml')
    assert Study.load(tmp_path / 's.yaml').name == 's'
    cv2.imwrite(str(tmp_path / 'a.png'), np.zeros((2, 2), np.uint8))
    load_image(tmp_path / 'a.png')
    load_labels(tmp_path / 'a.png')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run of two iterations, whose fraction leaves stage 1 one of them."""
    root, said = tmp_path_factory.mktemp('trained'), []
    hook = dict(switch_at=.9)
    cfg = tiny_config(root, RESIDUAL, hook, 2, log_level='WARNING')
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MMLogger, 'handle',
                      lambda self, record: said.append(record.getMessage()))
        runner = run(cfg)
    cfg.dump(root / 'config.py')
    return SimpleNamespace(
        root=root,
        said=''.join(said),
        config=str(root / 'config.py'),
        weights=str(root / 'work/iter_2.pth'),
        started=bool(runner.model.decode_head.text_branch.text.started))


def test_a_fraction_of_a_short_run(trained):
    assert 'leaves one stage nothing: stage 2 starts at' in trained.said
    assert trained.started


def test_a_rate_that_is_no_number(tmp_path):
    cfg = tiny_config(tmp_path, RESIDUAL, dict(switch_at=1), 2)
    cfg.optim_wrapper.optimizer.lr = float('nan')
    with pytest.raises(ValueError, match="'lr': nan.*optim_wrapper.optimizer"):
        run(cfg)
    assert not list(tmp_path.glob('work/*.pth'))


def test_config_of_a_checkpoint_is_not_run(trained, tmp_path):
    saved = torch.load(trained.weights, weights_only=True)
    saved['meta']['cfg'] = f'import os\nos.mkdir({str(tmp_path / "ran")!r})'
    torch.save(saved, tmp_path / 'w.pth')
    with pytest.raises(ValueError, match='give the config.*run as code'):
        TextSegInferencer(None, tmp_path / 'w.pth', device='cpu')
    TextSegInferencer(trained.config, tmp_path / 'w.pth', device='cpu')
    assert not (tmp_path / 'ran').exists()


def test_images_of_16_bits(trained, tmp_path):
    """They are those of 8 bits of which they were made."""
    mine = TextSegInferencer(trained.config, trained.weights, device='cpu')
    gray = np.random.default_rng(0).integers(0, 256, (32, 64), np.uint8)
    found = []
    for name, image in (('8', gray), ('16', gray.astype(np.uint16) * 257)):
        cv2.imwrite(str(tmp_path / f'{name}.png'), image)
        found.append(mine.pipeline(str(tmp_path / f'{name}.png'))['inputs'])
    assert torch.equal(*found) and found[0].unique().numel() > 200


def test_fold_without_a_test_set(trained, tmp_path, capsys):
    words = [trained.config, trained.weights, '--device', 'cpu', '--out']
    tool = load_tool('model_converters/textkd2mmseg.py')
    tool.main([*words, str(tmp_path / 'folded.pth')])
    assert (tmp_path / 'folded.pth').is_file()
    assert 'Only random inputs' in capsys.readouterr().out


WHERE = r"KeyError: instances \(.*test_errors.py, line .*\['instances'\]"
CUT = 'cannot be read as a config: Synta'


# Two tools of those that run a data set, three that read a config.
@each_case('tool, words, said', [
    ('deployment/deploy.py',
     'config.py work/iter_2.pth --to torchscript --eval config.py --out out',
     WHERE),
    ('analysis_tools/compare.py',
     'config.py work/iter_2.pth config.py work/iter_2.pth --out out', WHERE),
    ('test.py', 'config.py work/iter_2.pth --work-dir out', CUT),
    ('analysis_tools/get_flops.py', 'config.py', CUT),
    ('analysis_tools/benchmark_training.py', 'config.py', CUT),
])
def test_words_alone_are_no_message(trained, tmp_path, monkeypatch, tool,
                                    words, said):
    """Of a data set of the user, and of a config that is cut short."""
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(trained.config)
    cfg.val_dataloader.dataset.pipeline.insert(1, dict(type='NeedsInstances'))
    cfg.dump('config.py')
    if said == CUT:
        Path('config.py').write_text('model = dict(')
    Path('work').symlink_to(trained.root / 'work')
    monkeypatch.setattr(sys, 'argv', ['tool.py', *words.split()])
    with pytest.raises(SystemExit, match=f'(?s)^Error: .*{said}'):
        load_tool(tool).main()


def test_label_maps_of_one_name_are_not_written(trained, tmp_path,
                                                monkeypatch):
    """As of two videos, whose frames have the same numbers."""
    monkeypatch.chdir(tmp_path)
    for video in ('one', 'two'):
        for source, kind in (('img', 'origin'), ('ann', 'mask')):
            shutil.copytree(trained.root / 'data' / source,
                            f'videos/{video}/{kind}')
    cfg = Config.fromfile(trained.config)
    dataset = cfg.val_dataloader.dataset
    for part in ('dataloader', 'evaluator'):
        cfg[f'test_{part}'] = cfg[f'val_{part}']
    cfg.test_cfg = dict(type='TestLoop')
    cfg.test_dataloader.dataset = dict(
        type='VideoFramesDataset',
        data_root='videos',
        img_suffix='.png',
        metainfo=dataset.metainfo,
        pipeline=dataset.pipeline)
    cfg.dump('config.py')
    words = ['test.py', 'config.py', str(trained.weights), '--out', 'maps']
    monkeypatch.setattr(sys, 'argv', words)
    with pytest.raises(SystemExit, match='--out: 2 images .* 0.png: .*paths'):
        load_tool('test.py').main()
    assert not list(Path().glob('maps/*'))
    shutil.rmtree('videos/two')
    load_tool('test.py').main()
    names = {path.name for path in Path('videos').rglob('mask/*')}
    assert {path.name for path in Path('maps').iterdir()} == names


@TRANSFORMS.register_module()
class NeedsInstances(BaseTransform):
    """A transform for other data, as mmcv has them."""

    def transform(self, results):
        return results['instances']


NOWHERE = dict(vocabulary='toy_scenes', model='local-dir:/none')


@each_case('build, said', [
    (dict(build=NOWHERE, dim=16), '/none'),
    (dict(), 'no embeddings file .*none.safetensors.*encode_text.py'),
])
def test_text_that_is_not_there(tmp_path, monkeypatch, build, said):
    """It is told before data are loaded and a log is begun."""
    file = str(tmp_path / 'none.safetensors')
    text = dict(
        RESIDUAL, embeddings=dict(type='ClassEmbeddings', file=file, **build))
    cfg = tiny_config(tmp_path, text, dict(switch_at=1), 2)
    cfg.dump(tmp_path / 'config.py')
    monkeypatch.setattr(sys, 'argv', ['train.py', str(tmp_path / 'config.py')])
    with pytest.raises(SystemExit, match=said):
        load_tool('train.py').main()
    assert not (tmp_path / 'work').exists()


SCORES = dict(classes=['c'], val=dict(mIoU=1., IoU=[1.]), curve=[])
RUN = dict(study='s', network='n', arm='a', seed=0, iterations=1)
ENTRY = dict(RUN, train_fraction=1., config_hash='h', **SCORES)


def test_a_disk_that_is_full_costs_no_line(tmp_path):
    path = tmp_path / 'l.jsonl'
    ledger = Ledger(path)
    ledger.append(ENTRY)
    before = path.read_bytes()
    with full_disk(len(before) + 9), pytest.raises(
            OSError, match='no space|large'):
        ledger.append(dict(ENTRY, seed=1))
    assert path.read_bytes() == before
    assert ledger.append(dict(ENTRY, seed=1)) and len(ledger.entries) == 2


@pytest.fixture
def powerless():
    """A folder; permissions hold there, for root as for everybody."""
    with tempfile.TemporaryDirectory() as folder:
        root = os.geteuid() == 0
        os.chmod(folder, 0o755)

        def begin():
            if root:
                os.seteuid(65534)

        yield Path(folder), begin
        if root:
            os.seteuid(0)


def test_a_ledger_that_is_read_only_is_told_before_a_run(powerless):
    """Its tables can be made all the same."""
    folder, begin = powerless
    path = folder / 'l.jsonl'
    plan = dict(study='s', baseline='a', arms=dict(a={}), planned=1)
    assert Ledger(path).register(plan, 'today')
    assert not Ledger(path).register(plan, 'tomorrow')
    path.chmod(0o444)
    begin()
    ledger = Ledger(path)
    assert ledger.studies == ['s']
    for write in (lambda: ledger.register(plan, 'tomorrow'),
                  lambda: ledger.register(dict(plan, planned=2), 'tomorrow'),
                  lambda: ledger.append(ENTRY)):
        with pytest.raises(PermissionError, match='l.jsonl'):
            write()


def test_names_are_text_on_every_page():
    name = '<script>alert(1)</script>'
    scores = dict(IoU=[50., 50.], mIoU=50., mAcc=50., aAcc=50.)
    side = dict(scores, config='c.py', checkpoint='c.pth', images=1)
    side.update(classes=[name, 'b'], confusion=[[2, 1], [1, 2]])
    markdown = load_tool('analysis_tools/compare.py').markdown
    card = load_tool('model_converters/publish_model.py').model_card
    meta = dict(dataset_meta=dict(classes=[name]), published_with={})
    empty = ('name', 'file', 'size', 'sha256', 'params', 'dtypes', 'config',
             'where_config', 'text', 'checks')
    pages = [
        markdown(compare(side, side)),
        card(None, meta, **dict.fromkeys(empty, ''))
    ]
    for page in pages:
        assert '<script>' not in page and '&lt;script&gt;' in page


def write_ledger(path):
    ledger = Ledger(path)
    ledger.append(ENTRY)
    ledger.append(dict(ENTRY, seed=1))


IMAGE = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
# What is damaged and who reads it; where there are checksums also what has to
# be as it was, if it is read at all. Elsewhere it may be other words.
FILES = {
    'w.pth': (weights(dict(i=1)), read_checkpoint, str),
    'v.safetensors':
    (lambda path: encode_classes(['road', 'sky'], 'toyclip', 'none').save(
        path), TextEmbeddings.load, lambda text: text.sha256),
    'l.jsonl': (write_ledger, Ledger, None),
    's.yaml': (study(), Study.load, None),
    'i.png': (lambda path: cv2.imwrite(str(path), IMAGE), read_image, None),
    'n.json': (text(b'{"road": ["road", "street"], "car": "car"}'),
               Vocabulary.from_spec, None),
    'a.npy':
    (lambda path: np.save(path, np.eye(2, 4, dtype=np.float32)),
     lambda path: TextEmbeddings.from_vectors(path, ['a', 'b']), None),
}


@each_case('name', FILES)
def test_damage_at_random(tmp_path, name):
    """An error that names the file, or what was there; nothing else."""
    write, read, content = FILES[name]
    path, rng = tmp_path / name, np.random.default_rng(0)
    write(path)
    whole, before, faults = path.read_bytes(), read(path), 0
    for number in range(60):
        data, at = bytearray(whole), int(rng.integers(len(whole)))
        if number % 3 == 0:
            del data[at:]
        elif number % 3 == 1:
            data[at] ^= 1 << int(rng.integers(8))
        else:
            data[at:at + 9] = rng.bytes(9)
        path.write_bytes(data)
        try:
            found = read(path)
        except (OSError, ValueError) as error:
            assert name in str(error), (number, error)
            faults += 1
        else:
            assert not content or content(found) == content(before), number
    assert faults > 20
