# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""How vectors of new words are used, and the table by word."""
import json
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmengine.config import Config
from mmseg.apis import MMSegInferencer, inference_model, init_model
from mmseg.registry import DATASETS, MODELS
from network_tester import CONFIGS
from text_runs import FIXED, RUNS, make
from tiny import CLASSES
from tool_modules import ROOT, call, load_tool
from torch.testing import assert_close

from mmseg_textkd.analysis.new_words import measure_new_words
from mmseg_textkd.apis import TextSegInferencer
from mmseg_textkd.models.new_words import NEW_WORDS, place_new_words
from mmseg_textkd.models.text_providers import text_provider
from mmseg_textkd.study import Ledger
from mmseg_textkd.text.encode_classes import encode_classes

NEW = dict(sky='clouds', car='taxi', person='cyclist')


def test_ways_against_least_squares():
    trained, new = (
        F.normalize(torch.randn(n, 12), dim=1).double() for n in (5, 3))
    expected = torch.linalg.lstsq(trained.T, new.T).solution.T @ trained
    projected = place_new_words(new, trained, 'projected')
    assert_close(projected, expected)
    # What is left has nothing to do with any trained word.
    assert ((new - projected) @ trained.T).abs().max() < 1e-6
    unit = place_new_words(new, trained)
    assert_close(unit, F.normalize(expected, dim=1))
    # Ridge: least squares with a penalty on the weights.
    rows = torch.cat([trained.T, .1**.5 * torch.eye(5).double()])
    targets = F.pad(new.T, (0, 0, 0, 5))
    expected = torch.linalg.lstsq(rows, targets).solution.T @ trained
    ridge = place_new_words(new, trained, 'ridge')
    assert_close(ridge, expected)
    assert torch.equal(place_new_words(new, trained, 'raw'), new)
    # A trained word stays what it is.
    assert_close(place_new_words(trained, trained), trained)
    # Words without a direction are told.
    for how, message in (('unit', 'have nothing in common'),
                         ('best', 'must be one of')):
        with pytest.raises(ValueError, match=message):
            place_new_words(torch.eye(4)[3:], torch.eye(4)[:2], how)


@each_case('stride, padding', [(1, None), (3, dict(size_divisor=48))])
def test_the_table_says_what_the_inferencer_predicts(tmp_path, monkeypatch,
                                                     stride, padding):
    """At the pixels that are scored, whatever is padded."""
    run = make(tmp_path, *RUNS['fixed'])
    monkeypatch.chdir(tmp_path)
    bank = tmp_path / 'bank.safetensors'
    encode_classes(list(NEW.values()), 'toyclip', 'photo').save(bank)
    cfg, weights = Config.fromfile(run.config), tmp_path / 'weights.pth'
    cfg.model.data_preprocessor.test_cfg = padding
    cfg.dump(run.config)
    entries = list(
        measure_new_words(cfg.copy(), weights, cfg, NEW, bank, stride=stride))
    ledger = Ledger(tmp_path / 'ledger.jsonl')
    for entry in entries:
        ledger.append(json.loads(json.dumps(entry)))
    found = {entry['arm']: entry['val'] for entry in entries}
    assert len(found) == 1 + len(NEW_WORDS) + 2 + 2 * len(NEW)
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    mine = TextSegInferencer(run.config, run.weights, device='cpu')

    def score(**options):
        if options:
            mine.set_classes(embeddings=bank, **options)
        confusion = np.zeros((8, 8))
        for sample in map(dataset.__getitem__, range(len(dataset))):
            image = sample['inputs'].permute(1, 2, 0).numpy()
            labels, truth = (
                x[::stride, ::stride]
                for x in (mine(image)['predictions'],
                          sample['data_samples'].gt_sem_seg.data[0].numpy()))
            confusion += np.histogram2d(
                truth.ravel(), labels.ravel(), bins=(range(9), range(9)))[0]
        same = confusion.diagonal()
        both = confusion.sum(0) + confusion.sum(1) - same
        return pytest.approx(100 * (same / both)[both > 0].mean(), abs=.006)

    assert found['trained names']['mIoU'] == score()
    words = [NEW.get(name, name) for name in CLASSES]
    one = [dict(car='taxi').get(name, name) for name in CLASSES]
    cases = [
        ('all new, unit', dict(classes=words)),
        ('all new, raw', dict(classes=words, new_words='raw')),
        ('all new, ridge', dict(classes=words, new_words='ridge')),
        ('car -> taxi, unit', dict(classes=one)),
    ]
    for arm, options in cases:
        assert found[arm]['mIoU'] == score(**options), arm
    with pytest.raises(ValueError, match=r"given for \['bus'\]"):
        next(measure_new_words(cfg, weights, cfg, dict(bus='taxi'), bank))
    cfg.model.test_cfg = dict(mode='slide', crop_size=(16, 16), stride=(8, 8))
    with pytest.raises(ValueError, match='in windows.*mode=whole'):
        next(measure_new_words(cfg, weights, cfg, NEW, bank))


def test_phrases_of_the_training_span_too(tmp_path, monkeypatch):
    """A phrase that was sampled in training is used as it is."""
    run = make(tmp_path, *RUNS['fixed'])
    monkeypatch.chdir(tmp_path)
    bank, words = tmp_path / 'bank.safetensors', dict(car='van', road='lava')
    encode_classes(
        'toy_scenes+synonyms', 'toyclip', 'photo', keep_bank=True).save(bank)
    cfg = Config.fromfile(run.config)
    cfg.model.decode_head.text = dict(
        type='SynonymSampler', file=str(bank), dim=64)
    cfg.dump(run.config)
    new = tmp_path / 'new.safetensors'
    encode_classes(list(words.values()), 'toyclip', 'photo').save(new)

    def used():
        mine = TextSegInferencer(run.config, run.weights, device='cpu')
        folded = {}
        for how in ('unit', 'raw'):
            mine.set_classes(
                list(words.values()), embeddings=new, new_words=how)
            folded[how] = mine.model.decode_head.conv_seg.weight.flatten(1)
        return [(a - b).abs().max() for a, b in zip(*folded.values())]

    van, lava = used()
    assert van < 1e-5 and lava > 1e-3
    found = {
        entry['arm']: entry['val']
        for entry in measure_new_words(cfg.copy(), tmp_path /
                                       'weights.pth', cfg, words, new)
    }
    same = found['car -> van, unit'], found['car -> van, raw']
    assert same[0] == same[1]
    # Without the file the phrases are not known, and that is said.
    bank.unlink()
    said = []
    monkeypatch.setattr(text_provider, 'print_log', lambda *a: said.append(a))
    van, lava = used()
    assert min(van, lava) > 1e-3
    message, _, level = said.pop()
    assert not said and level == logging.WARNING
    assert 'names alone: the file' in message


BANK = dict(type='SynonymSampler', file='bank.safetensors', dim=64)
# It learns beside a buffer, which nothing has brought up to date.
LEARNED = dict(type='LearnedEmbeddings', dim=64)

FEWER, MORE = ['van', 'road', 'lava'], [*CLASSES[::-1], 'van']
# As many: the rows of a classifier that is left over would be of old words.
OTHER = ['lava', *CLASSES[:-1]]


@pytest.mark.parametrize('text, head, words, network', (
    (*RUNS['l2'], FEWER, None),
    (BANK, {}, FEWER, None),
    (LEARNED, {}, ['car', 'road', 'sky'], None),
    (FIXED, {}, FEWER, 'bisenetv2_fcn'),
    (FIXED, {}, MORE, 'bisenetv2_fcn'),
    (FIXED, {}, FEWER, 'ddrnet_23-slim_in1k-pre'),
    (FIXED, {}, MORE, 'ddrnet_23-slim_in1k-pre'),
    (FIXED, {}, OTHER, 'ddrnet_23-slim_in1k-pre'),
    (*RUNS['auxiliary'], ['car', 'road'], 'ddrnet_23-slim_in1k-pre'),
    (FIXED, {}, FEWER, 'pidnet-s'),
    (FIXED, dict(out_channels=len(CLASSES)), MORE, 'pidnet-s'),
))
def test_the_tool_folds_what_the_inferencer_predicts(tmp_path, monkeypatch,
                                                     text, head, words,
                                                     network):
    monkeypatch.chdir(tmp_path)
    if network:
        network, = (CONFIGS / 'text_classifier'
                    ).glob(f'textkd_{network}_vit-b16_*_cityscapes-*.py')
    encode_classes(
        'toy_scenes+synonyms', 'toyclip', 'photo',
        keep_bank=True).save(tmp_path / 'bank.safetensors')
    encode_classes(['van', 'lava'], 'toyclip', 'photo').save('new.safetensors')
    run = make(tmp_path, text, head, network)
    mine = TextSegInferencer(run.config, run.weights, device='cpu')
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        own = mine.model(image, mode='tensor')
        mine.set_classes(words, embeddings='new.safetensors')
        expected = mine.model(image, mode='tensor')
    # Longer than the name of a file may be.
    names = f',{" " * 255}'.join(words)
    call('model_converters/textkd2mmseg.py', run.config, run.weights, '--l2',
         'keep', '--classes', names, '--embeddings', 'new.safetensors',
         '--device', 'cpu', '--out', 'stock.pth')
    stock = MODELS.build(Config.fromfile('stock.py').model).eval()
    state, before = (
        torch.load(name)['state_dict'] for name in ('stock.pth', run.weights))
    stock.load_state_dict(state, strict=True)
    with torch.no_grad():
        found = stock(image, mode='tensor')
    assert found.shape[1] == len(words)
    bound = 1e-5 * expected.abs().max().item()
    assert_close(found, expected, rtol=0, atol=bound)
    # A classifier for losses alone has nothing for a new word.
    rest = [f'decode_head.{name}_cls_seg' for name in ('aux', 'p')]
    rest = [k for k in state if k.startswith(tuple(rest))]
    assert len(rest) == (0 if network is None or 'bise' in network.name else 2)
    for k, word in enumerate(words):
        if word in CLASSES:
            row = CLASSES.index(word)
            assert_close(expected[:, k], own[:, row], rtol=0, atol=bound)
        for key in rest:
            old = before[key][row] if word in CLASSES else 0 * state[key][k]
            assert torch.equal(state[key][k], old)


def test_the_written_config_is_for_inference_and_tests_on_what_is_added(
        tmp_path, monkeypatch):
    run = make(tmp_path, *RUNS['fixed'])
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(run.config)
    cfg.visualizer = dict(type='SegLocalVisualizer')
    cfg.dump(run.config)
    words = ['taxi', *CLASSES[1:]]
    encode_classes(words[:1], 'toyclip', 'photo').save('new.safetensors')
    call('model_converters/textkd2mmseg.py', run.config, run.weights,
         '--classes', ', '.join(words), '--embeddings', 'new.safetensors',
         '--device', 'cpu', '--out', 'words.pth')
    model = init_model('words.py', 'words.pth', device='cpu')
    found = inference_model(model, run.images[0]).pred_sem_seg.data[0].numpy()
    inferencer = MMSegInferencer('words.py', 'words.pth', device='cpu')
    assert (inferencer(run.images[0])['predictions'] == found).all()

    def test(*options):
        argv = ['test.py', 'words.py', 'words.pth', *options]
        monkeypatch.setattr('sys.argv', argv)
        load_tool('test.py').main()

    with pytest.raises(FileNotFoundError, match='DATA_ROOT/IMAGES'):
        test()
    data = 'test_dataloader.dataset.'
    test('--work-dir', 'scores', '--cfg-options', f'{data}data_root=data',
         f'{data}data_prefix.img_path=img', f'{data}img_suffix=.png',
         f'{data}data_prefix.seg_map_path=ann')
    scores, = (tmp_path / 'scores').glob('*/*.json')
    assert json.loads(scores.read_text())['mIoU'] > 0


def test_a_seed_that_was_not_measured_to_its_end_counts_nowhere(
        tmp_path, capsys):
    """Else columns would be means of other seeds."""
    results = ROOT / 'docs' / 'results' / 'new_words.jsonl'
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    lines = [entry for entry in lines if entry['study'] == 'CamVid']
    seeds = sorted({entry['seed'] for entry in lines})[:3]
    own = [entry for entry in lines if entry['seed'] in seeds]
    pages = []
    for number, left in enumerate((own, own[:-1])):
        path = tmp_path / f'{number}' / 'ledger.jsonl'
        path.parent.mkdir()
        path.write_text(''.join(f'{json.dumps(line)}\n' for line in left
                                if number or line['seed'] != own[-1]['seed']))
        load_tool('analysis_tools/new_words.py').main(['table', str(path)])
        pages.append(capsys.readouterr().out)
    assert pages[0] == pages[1] and '| 2 |' in pages[0]
    path.write_text(''.join(
        f'{json.dumps(line)}\n' for line in own
        if line['arm'] != own[seeds.index(line['seed'])]['arm']))
    with pytest.raises(SystemExit, match='CamVid has no seed with all of'):
        load_tool('analysis_tools/new_words.py').main(['table', str(path)])


def test_pixels_of_other_places_are_in_tables_of_their_own(tmp_path, capsys):
    results = ROOT / 'docs' / 'results' / 'new_words.jsonl'
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    own = [entry for entry in lines if entry['study'] == 'CamVid']
    for entry in own:
        if entry['seed'] == own[0]['seed']:
            del entry['aligned']
    (tmp_path / 'l.jsonl').write_text(''.join(f'{json.dumps(entry)}\n'
                                              for entry in own))
    load_tool('analysis_tools/new_words.py').main(
        ['table', str(tmp_path / 'l.jsonl')])
    page = capsys.readouterr().out
    assert page.count('### CamVid, ') == 2 and page.count('half a stride') == 1
    assert '| trained names | 1 |' in page and '| trained names | 4 |' in page


def test_the_published_page_is_what_the_ledger_says(capsys):
    tool = load_tool('analysis_tools/new_words.py')
    results = ROOT / 'docs' / 'results'
    tool.main(['table', str(results / 'new_words.jsonl')])
    page = (results / 'new_words.md').read_text(encoding='utf-8')
    assert capsys.readouterr().out == page
