# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Training on two data sets: metrics, resume, processes, deployment."""
import itertools
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import MMDistributedDataParallel
from mmseg.registry import DATA_SAMPLERS, DATASETS, MODELS
from processes import load, run_ranks
from scipy.linalg import block_diag
from tiny import assert_equal, run
from tool_modules import exit_of, load_tool
from torch.testing import assert_close
from words_data import DIM, OWN, SPACES, WORDS

from mmseg_textkd.analysis.compare import evaluate
from mmseg_textkd.apis import TextSegInferencer
from mmseg_textkd.deploy import fold as fold_model
from mmseg_textkd.deploy.export_check import validation
from mmseg_textkd.deploy.load_stock import load_stock
from mmseg_textkd.text import TextEmbeddings

FAST = {'optim_wrapper.optimizer.lr': 0.3}


@pytest.fixture
def trained(network_cfg, tmp_path):
    """A run through both stages, with its config as a file."""
    cfg = network_cfg(**FAST)
    cfg.dump(str(tmp_path / 'config.py'))
    return run(cfg)


def test_metrics_of_each_data_set_and_a_resumed_run(trained, network_cfg,
                                                    tmp_path):
    """One run: what it measures, by hand; cut in two, bit for bit."""
    found = trained.val_loop.run()
    assert {'town/mIoU', 'lane/mIoU', 'town/aAcc'} <= found.keys()
    model, dataset = trained.model.eval(), trained.val_dataloader.dataset
    confusions = {name: np.zeros((4, 4)) for name in OWN}
    for index in range(len(dataset)):
        with torch.no_grad():
            done, = model.test_step(pseudo_collate([dataset[index]]))
        probability, truth = done.seg_logits.data.softmax(0), done.gt_sem_seg
        space = torch.tensor(SPACES[done.dataset])
        words = [WORDS.index(word) for word in OWN[done.dataset]]
        own = torch.stack([probability[space == w].sum(0) for w in words])
        for k, word in enumerate(words):
            labels = own.argmax(0)[truth.data[0] == word]
            counts = torch.bincount(labels, minlength=4).numpy()
            confusions[done.dataset][k] += counts
    for name, confusion in confusions.items():
        same = confusion.diagonal()
        iou = same / (confusion.sum(0) + confusion.sum(1) - same)
        assert found[f'{name}/mIoU'] == pytest.approx(
            100 * iou.mean(), abs=.006)
    # The comparison of two checkpoints joins the data sets.
    joined = evaluate(
        str(tmp_path / 'config.py'), tmp_path / 'work/iter_4.pth',
        tmp_path / 'evaluated')
    for name in OWN:
        assert joined['datasets'][name]['mIoU'] == found[f'{name}/mIoU']
    assert joined['mIoU'] == pytest.approx(
        (found['town/mIoU'] + found['lane/mIoU']) / 2, abs=.006)
    assert joined['classes'][4:6] == ['lane: road', 'lane: car']
    assert joined['images'] == 8
    expected = block_diag(*confusions.values())
    assert np.array_equal(joined['confusion'], expected)
    again = tmp_path / 'again'
    again.mkdir()
    shutil.copy(tmp_path / 'work/iter_2.pth', again)
    (again / 'last_checkpoint').write_text(str(again / 'iter_2.pth'))
    run(network_cfg(**FAST, work_dir=str(again), resume=True))
    half, whole, resumed = (
        load(tmp_path / file)
        for file in ('work/iter_2.pth', 'work/iter_4.pth', 'again/iter_4.pth'))
    for part in ('state_dict', 'optimizer', 'param_schedulers'):
        assert_equal(whole[part], resumed[part], part)
    offset = 'decode_head.conv_seg.text.offset'
    assert not torch.equal(half['state_dict'][offset],
                           whole['state_dict'][offset])
    assert tuple(whole['meta']['dataset_meta']['classes']) == WORDS


def test_images_are_segmented_in_any_words(trained, tmp_path):
    """Prepared as those of the first data set."""
    weights = tmp_path / 'work/iter_4.pth'
    cfg = Config.fromfile(tmp_path / 'config.py')
    cfg.test_dataloader.dataset.datasets[1].pipeline = []
    inferencer = TextSegInferencer(cfg, weights)
    dataset = trained.val_dataloader.dataset
    sample = pseudo_collate([dataset[6]])
    path = sample['data_samples'][0].img_path
    found = inferencer(path)['predictions']
    with torch.no_grad():
        done, = trained.model.eval().test_step(sample)
    assert inferencer.classes == WORDS
    # The evaluation compares the words of the data set alone.
    assert np.array_equal(found, done.seg_logits.data.argmax(0))
    inferencer.set_classes(['road', 'car'])
    rows = [WORDS.index(word) for word in inferencer.classes]
    assert np.array_equal(
        inferencer(path)['predictions'], done.seg_logits.data[rows].argmax(0))


def gradients(rank, size, cfg, folder):
    """Gradients of one batch over all processes."""
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).train()
    for module in model.modules():
        if hasattr(module, 'running_mean'):
            module.eval()  # statistics are of one process
    wrapped = model
    if size > 1:
        dist.init_process_group(
            'gloo', f'file://{folder}/store', rank=rank, world_size=size)
        wrapped = MMDistributedDataParallel(
            model, broadcast_buffers=False, find_unused_parameters=True)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    sampler = DATA_SAMPLERS.build(
        dict(type='BalancedDatasetSampler', dataset=dataset, seed=2))
    chosen = [*itertools.islice(sampler, 4 // size)]
    batch = model.data_preprocessor(
        pseudo_collate([dataset[i] for i in chosen]), True)
    total, _ = model.parse_losses(wrapped(**batch, mode='loss'))
    total.backward()
    found = {
        name: p.grad
        for name, p in model.named_parameters() if p.grad is not None
    }
    torch.save((chosen, found), f'{folder}/{size}_{rank}.pth')


def test_two_processes_have_the_gradients_of_one(network_cfg, tmp_path):
    cfg = network_cfg()
    gradients(0, 1, cfg, tmp_path)
    run_ranks(gradients, cfg, tmp_path)
    (images, one), (first, a), (second, b) = (
        torch.load(tmp_path / f'{name}.pth') for name in ('1_0', '2_0', '2_1'))
    assert first != second and sorted(first + second) == sorted(images)
    # Images of both data sets, unlike on the two sides.
    assert len({i < 5 for i in images}) == 2
    assert any('text' not in name for name in one)
    for rank in (a, b):
        assert_close(rank, one, rtol=1e-4, atol=1e-6)


@pytest.fixture
def fold(tmp_path):
    """``textkd2mmseg.py`` in this process, on a checkpoint of a model."""

    def run(cfg, model, name, words=None, embeddings=None):
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
        cfg.dump(str(tmp_path / 'config.py'))
        meta = dict(dataset_meta=dataset.metainfo)
        torch.save(
            dict(state_dict=model.state_dict(), meta=meta), tmp_path / 'w.pth')
        argv = [tmp_path / 'config.py', tmp_path / 'w.pth']
        argv += ['--out', tmp_path / f'{name}.pth']
        if words is not None:
            (tmp_path / f'{name}.txt').write_text('\n'.join(words))
            argv += ['--classes', tmp_path / f'{name}.txt']
        if embeddings is not None:
            embeddings.save(tmp_path / f'{name}.st')
            argv += ['--embeddings', tmp_path / f'{name}.st']
        tool = load_tool('model_converters/textkd2mmseg.py')
        tool.main([str(word) for word in argv])
        return torch.load(tmp_path / f'{name}.pth', weights_only=True)

    return run


def test_fold_for_any_list_of_words(network_cfg, tmp_path, fold, data):
    """All words, those of one data set, and some that are new."""
    cfg = network_cfg(**{'default_hooks.checkpoint.save_best': 'lane/mIoU'})
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    torch.nn.init.normal_(model.decode_head.conv_seg.logit_bias)
    new = TextEmbeddings(
        F.normalize(torch.randn(2, DIM), dim=1), ('tree house', 'sky'))
    sample = pseudo_collate([dataset[6]])
    logits, stock = model.test_step(sample)[0].seg_logits.data, {}
    for name, words, embeddings in (('all', None, None), ('lane', OWN['lane'],
                                                          None),
                                    ('a,b', ('road', 'tree house', 'car'),
                                     new)):
        state = fold(cfg, model, name, words, embeddings)
        own = Config.fromfile(tmp_path / f'{name}.py')
        assert own.model.type == 'EncoderDecoder'
        assert own.model.decode_head.type == 'FCNHead'
        assert 'mmseg_textkd' not in own.pretty_text
        network = MODELS.build(own.model).eval()
        network.load_state_dict(state['state_dict'])
        stock[name] = network.test_step(sample)[0].seg_logits.data
        classes = tuple(state['meta']['dataset_meta']['classes'])
        assert classes == (words or WORDS)
    rows = [WORDS.index(word) for word in OWN['lane']]
    # A trained word is as before, beside a new one.
    for found, expected in ((stock['all'], logits), (stock['lane'],
                                                     logits[rows]),
                            (stock['a,b'][[0, 2]], logits[[1, 4]])):
        assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(stock['a,b'][1], logits[6], atol=.1)
    # Folded on the way, from the text checkpoint or the folded one.
    bare = fold_model(model, cfg)
    assert 'test_dataloader' not in bare.cfg
    model.dataset_meta = dataset.metainfo
    for network in (bare, fold_model(
            model,
            cfg), *(load_stock(str(tmp_path / 'config.py'), tmp_path / name)[1]
                    for name in ('w.pth', 'all.pth'))):
        found = network.test_step(sample)[0].seg_logits.data
        assert_close(found, logits, rtol=1e-4, atol=1e-4)
    inferencer = TextSegInferencer(
        tmp_path / 'config.py', tmp_path / 'all.pth', device='cpu')
    assert inferencer.classes == WORDS
    # One data set is trained and tested as ever; a list of words is not.
    lane, new = (
        Config.fromfile(tmp_path / f'{name}.py') for name in ('lane', 'a,b'))
    labels = DATASETS.build(lane.test_dataloader.dataset)
    assert len(labels) == 3 and labels.metainfo['classes'] == OWN['lane']
    assert lane.val_evaluator.type == 'IoUMetric'
    assert lane.default_hooks.checkpoint.save_best == 'mIoU'
    assert 'train_dataloader' not in new and 'val_evaluator' not in new
    assert new.test_dataloader.dataset.pipeline
    with pytest.raises(ValueError, match='labels of one data set'):
        validation(str(tmp_path / 'config.py'))


@pytest.mark.parametrize('option', [['--tta'], ['--out', 'labels']])
def test_options_for_one_data_set(network_cfg, tmp_path, monkeypatch, capsys,
                                  option):
    network_cfg().dump(tmp_path / 'c.py')
    code, *_ = exit_of('test.py', monkeypatch, capsys, str(tmp_path / 'c.py'),
                       'weights.pth', *option)
    assert f'Error: {option[0]}: MMSegmentation has it for one' in code


def test_a_config_that_tests_on_nothing(network_cfg, tmp_path, monkeypatch):
    """MMEngine says so, not the look for several data sets."""
    cfg = network_cfg()
    for key in ('test_dataloader', 'test_cfg', 'test_evaluator'):
        cfg.pop(key)
    cfg.dump(tmp_path / 'c.py')
    with pytest.raises(RuntimeError, match='test_loop'):
        exit_of('test.py', monkeypatch, None, str(tmp_path / 'c.py'),
                'weights.pth')


def test_only_trained_words_in_the_role_auxiliary(network_cfg, tmp_path, fold):
    cfg = network_cfg('auxiliary')
    model = MODELS.build(cfg.model).eval()
    state = fold(cfg, model, 'own', ('car', 'sky'))['state_dict']
    assert torch.equal(state['decode_head.conv_seg.weight'],
                       model.decode_head.conv_seg.weight[[4, 0]])
    bus = TextEmbeddings(torch.eye(DIM)[:1], ('bus', ))
    with pytest.raises(SystemExit, match='knows no text'):
        fold(cfg, model, 'new', ('car', 'bus'), bus)
    assert not (tmp_path / 'new.pth').exists()
