# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""How vectors of new words are used, and the table by word."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmseg.registry import DATASETS
from text_runs import RUNS, make
from tiny import CLASSES
from tool_modules import ROOT, load_tool

from mmseg_textkd.analysis.new_words import measure_new_words
from mmseg_textkd.apis import TextSegInferencer
from mmseg_textkd.models.new_words import NEW_WORDS, place_new_words
from mmseg_textkd.study import Ledger
from mmseg_textkd.text.encode_classes import encode_classes

NEW = dict(sky='clouds', car='taxi', person='cyclist')


def test_ways_against_least_squares():
    generator = torch.Generator().manual_seed(0)
    trained, new = (
        F.normalize(torch.randn(n, 12, generator=generator), dim=1).double()
        for n in (5, 3))
    weights = torch.linalg.lstsq(trained.T, new.T).solution
    expected = weights.T @ trained
    projected = place_new_words(new, trained, 'projected')
    torch.testing.assert_close(projected, expected)
    # What is left has nothing to do with any trained word.
    assert ((new - projected) @ trained.T).abs().max() < 1e-6
    unit = place_new_words(new, trained)
    torch.testing.assert_close(unit, F.normalize(expected, dim=1))
    # Ridge: least squares with a penalty on the weights.
    rows = torch.cat([trained.T, .1**.5 * torch.eye(5).double()])
    targets = torch.cat([new.T, torch.zeros(5, 3).double()])
    expected = torch.linalg.lstsq(rows, targets).solution.T @ trained
    torch.testing.assert_close(
        place_new_words(new, trained, 'ridge'), expected)
    assert torch.equal(place_new_words(new, trained, 'raw'), new)
    # A trained word stays what it is.
    torch.testing.assert_close(place_new_words(trained, trained), trained)


def test_words_without_a_direction_are_told():
    with pytest.raises(ValueError, match='have nothing in common'):
        place_new_words(torch.eye(4)[3:], torch.eye(4)[:2])
    with pytest.raises(ValueError, match='must be one of'):
        place_new_words(torch.eye(4)[3:], torch.eye(4)[:2], 'best')


def test_the_table_says_what_the_inferencer_predicts(tmp_path, monkeypatch):
    run = make(tmp_path, *RUNS['fixed'])
    monkeypatch.chdir(tmp_path)
    bank = tmp_path / 'bank.safetensors'
    encode_classes(list(NEW.values()), 'toyclip', 'photo').save(bank)
    cfg = Config.fromfile(run.config)
    entries = list(
        measure_new_words(
            cfg.copy(), tmp_path / 'weights.pth', cfg, NEW, bank, stride=1))
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
        same, both = np.zeros(8), np.zeros(8)
        for sample in map(dataset.__getitem__, range(len(dataset))):
            image = sample['inputs'].permute(1, 2, 0).numpy()
            labels = mine(image)['predictions']
            truth = sample['data_samples'].gt_sem_seg.data[0].numpy()
            for k in range(8):
                same[k] += ((labels == k) & (truth == k)).sum()
                both[k] += ((labels == k) | (truth == k)).sum()
        return pytest.approx(100 * (same / both)[both > 0].mean(), abs=.006)

    assert found['trained names']['mIoU'] == score()
    words = [NEW.get(name, name) for name in CLASSES]
    assert found['all new, unit']['mIoU'] == score(classes=words)
    for how in ('raw', 'ridge'):
        assert found[f'all new, {how}']['mIoU'] == score(
            classes=words, new_words=how)
    one = [dict(car='taxi').get(name, name) for name in CLASSES]
    assert found['car -> taxi, unit']['mIoU'] == score(classes=one)
    with pytest.raises(ValueError, match=r"given for \['bus'\]"):
        next(
            measure_new_words(cfg.copy(), tmp_path / 'weights.pth', cfg,
                              dict(bus='taxi'), bank))


def test_the_published_page_is_what_the_ledger_says(capsys):
    tool = load_tool('analysis_tools/new_words.py')
    results = ROOT / 'docs' / 'results'
    tool.main(['table', str(results / 'new_words.jsonl')])
    page = (results / 'new_words.md').read_text(encoding='utf-8')
    assert capsys.readouterr().out == page
