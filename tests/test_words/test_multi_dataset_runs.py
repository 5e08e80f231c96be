# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Training on two data sets: metrics, resume, processes, deployment."""
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
from tiny import assert_equal, run
from tool_modules import load_tool
from words_data import DIM, OWN, SPACES, WORDS

from mmseg_textkd.analysis.compare import evaluate
from mmseg_textkd.text import TextEmbeddings


@pytest.fixture
def trained(network_cfg, tmp_path):
    """A run through both stages, with its config as a file."""
    cfg = network_cfg(**{
        'default_hooks.checkpoint.interval': 2,
        'optim_wrapper.optimizer.lr': 0.3
    })
    cfg.dump(str(tmp_path / 'config.py'))
    return run(cfg)


def test_metrics_of_each_data_set_and_a_resumed_run(trained, network_cfg,
                                                    tmp_path):
    """One run: what it measures, by hand; cut in two, bit for bit."""
    found = trained.val_loop.run()
    assert {'town/mIoU', 'lane/mIoU', 'town/aAcc'} <= found.keys()
    model, dataset = trained.model.eval(), trained.val_dataloader.dataset
    for name, words in OWN.items():
        same, both = np.zeros(4), np.zeros(4)
        for index in range(len(dataset)):
            sample = dataset[index]
            if sample['data_samples'].dataset != name:
                continue
            with torch.no_grad():
                done, = model.test_step(pseudo_collate([sample]))
            probability = done.seg_logits.data.double().softmax(dim=0)
            own = torch.stack([
                sum(p for p, w in zip(probability, SPACES[name])
                    if w == WORDS.index(word)) for word in words
            ]).argmax(dim=0)
            truth = done.gt_sem_seg.data[0]
            for k, word in enumerate(words):
                a = (own == k) & (truth != 255)
                b = truth == WORDS.index(word)
                same[k] += (a & b).sum()
                both[k] += (a | b).sum()
        assert found[f'{name}/mIoU'] == pytest.approx(
            100 * np.mean(same / both), abs=.006)
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
    confusion = np.array(joined['confusion'])
    assert not confusion[:4, 4:].any() and confusion[4:, 4:].any()
    cfg = network_cfg(
        **{
            'default_hooks.checkpoint.interval': 2,
            'optim_wrapper.optimizer.lr': 0.3,
            'work_dir': str(tmp_path / 'again'),
            'resume': True
        })
    (tmp_path / 'again').mkdir()
    shutil.copy(tmp_path / 'work/iter_2.pth', tmp_path / 'again')
    (tmp_path / 'again/last_checkpoint').write_text(
        str(tmp_path / 'again/iter_2.pth'))
    run(cfg)
    whole, resumed = (
        load(tmp_path / folder / 'iter_4.pth') for folder in ('work', 'again'))
    for part in ('state_dict', 'optimizer', 'param_schedulers'):
        assert_equal(whole[part], resumed[part], part)
    assert not torch.equal(
        load(tmp_path / 'work/iter_2.pth')['state_dict']
        ['decode_head.conv_seg.text.offset'],
        whole['state_dict']['decode_head.conv_seg.text.offset'])
    # The words are in the checkpoint, which is read without pickle.
    meta = torch.load(
        tmp_path / 'work/iter_4.pth',
        weights_only=False)['meta']['dataset_meta']
    assert tuple(meta['classes']) == WORDS


def gradients(rank, size, cfg, folder):
    """Gradients of one batch over all processes."""
    if size > 1:
        dist.init_process_group(
            'gloo',
            init_method=f'file://{folder}/store',
            rank=rank,
            world_size=size)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).train()
    for module in model.modules():
        if hasattr(module, 'running_mean'):
            module.eval()  # statistics are of one process
    wrapped = model
    if size > 1:
        wrapped = MMDistributedDataParallel(
            model, broadcast_buffers=False, find_unused_parameters=True)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    sampler = DATA_SAMPLERS.build(
        dict(type='BalancedDatasetSampler', dataset=dataset, seed=2))
    chosen = [i for i, _ in zip(sampler, range(4 // size))]
    batch = model.data_preprocessor(
        pseudo_collate([dataset[i] for i in chosen]), True)
    losses = wrapped(**batch, mode='loss')
    total, _ = model.parse_losses(losses)
    total.backward()
    torch.save(
        dict(
            images=chosen,
            gradients={
                name: p.grad
                for name, p in model.named_parameters() if p.grad is not None
            }), f'{folder}/{size}_{rank}.pth')


def test_two_processes_have_the_gradients_of_one(network_cfg, tmp_path):
    cfg = network_cfg()
    gradients(0, 1, cfg, tmp_path)
    run_ranks(gradients, cfg, tmp_path)
    one, first, second = (
        torch.load(tmp_path / f'{name}.pth') for name in ('1_0', '2_0', '2_1'))
    assert first['images'] != second['images']
    assert sorted(first['images'] + second['images']) == sorted(one['images'])
    # Images of both data sets, unlike on the two sides.
    assert len({i < 5 for i in one['images']}) == 2
    assert one['gradients'].keys() == first['gradients'].keys()
    assert any('text' not in name for name in one['gradients'])
    for name, value in one['gradients'].items():
        for rank in (first, second):
            torch.testing.assert_close(
                rank['gradients'][name], value, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------- deployment
@pytest.fixture
def fold():
    """``textkd2mmseg.py``, in this process."""
    return load_tool('model_converters/textkd2mmseg.py').main


def test_fold_for_any_list_of_words(network_cfg, tmp_path, fold, data):
    """All words, those of one data set, and some that are new."""
    cfg = network_cfg()
    cfg.dump(str(tmp_path / 'config.py'))
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    torch.nn.init.normal_(model.decode_head.conv_seg.logit_bias)
    torch.save(
        dict(
            state_dict=model.state_dict(),
            meta=dict(dataset_meta=dataset.metainfo)), tmp_path / 'w.pth')
    new = F.normalize(torch.randn(2, DIM), dim=1)
    TextEmbeddings(new, ('tree house', 'sky')).save(tmp_path / 'new.st')
    (tmp_path / 'new.txt').write_text('road\ntree house\ncar\n')
    (tmp_path / 'lane.txt').write_text('\n'.join(OWN['lane']))
    common = [str(tmp_path / 'config.py'), str(tmp_path / 'w.pth')]
    fold([*common, '--out', str(tmp_path / 'all.pth')])
    fold([
        *common, '--out',
        str(tmp_path / 'lane.pth'), '--classes',
        str(tmp_path / 'lane.txt')
    ])
    fold([
        *common, '--out',
        str(tmp_path / 'new.pth'), '--classes',
        str(tmp_path / 'new.txt'), '--embeddings',
        str(tmp_path / 'new.st')
    ])
    sample = pseudo_collate([dataset[6]])
    logits = model.test_step(sample)[0].seg_logits.data
    stock = {}
    for name in ('all', 'lane', 'new'):
        own = Config.fromfile(tmp_path / f'{name}.py')
        assert own.model.type == 'EncoderDecoder'
        assert own.model.decode_head.type == 'FCNHead'
        assert 'mmseg_textkd' not in own.pretty_text
        state = torch.load(tmp_path / f'{name}.pth', weights_only=True)
        network = MODELS.build(own.model).eval()
        network.load_state_dict(state['state_dict'])
        stock[name] = network.test_step(sample)[0].seg_logits.data
        assert tuple(state['meta']['dataset_meta']['classes']) == {
            'all': WORDS,
            'lane': OWN['lane'],
            'new': ('road', 'tree house', 'car')
        }[name]
    torch.testing.assert_close(stock['all'], logits, rtol=1e-4, atol=1e-4)
    rows = [WORDS.index(word) for word in OWN['lane']]
    torch.testing.assert_close(
        stock['lane'], logits[rows], rtol=1e-4, atol=1e-4)
    # A trained word is as before, beside a new one.
    torch.testing.assert_close(
        stock['new'][[0, 2]], logits[[1, 4]], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(stock['new'][1], logits[6], atol=.1)
    # One data set is trained and tested as ever; a list of words is not.
    lane = Config.fromfile(tmp_path / 'lane.py')
    labels = DATASETS.build(lane.test_dataloader.dataset)
    assert len(labels) == 3 and labels.metainfo['classes'] == OWN['lane']
    assert lane.val_evaluator.type == 'IoUMetric'
    new = Config.fromfile(tmp_path / 'new.py')
    assert 'train_dataloader' not in new and 'test_evaluator' not in new
    assert new.test_dataloader.dataset.pipeline


def test_only_trained_words_in_the_role_auxiliary(network_cfg, tmp_path, fold):
    cfg = network_cfg('auxiliary')
    cfg.dump(str(tmp_path / 'config.py'))
    model = MODELS.build(cfg.model).eval()
    meta = DATASETS.build(cfg.test_dataloader.dataset).metainfo
    torch.save(
        dict(state_dict=model.state_dict(), meta=dict(dataset_meta=meta)),
        tmp_path / 'w.pth')
    TextEmbeddings(torch.eye(DIM)[:1], ('bus', )).save(tmp_path / 'new.st')
    for name, words in (('own', 'car\nsky'), ('new', 'car\nbus')):
        (tmp_path / f'{name}.txt').write_text(words)
    common = [str(tmp_path / 'config.py'), str(tmp_path / 'w.pth')]
    fold([
        *common, '--out',
        str(tmp_path / 'own.pth'), '--classes',
        str(tmp_path / 'own.txt')
    ])
    state = torch.load(tmp_path / 'own.pth', weights_only=True)['state_dict']
    assert torch.equal(state['decode_head.conv_seg.weight'],
                       model.decode_head.conv_seg.weight[[4, 0]])
    with pytest.raises(SystemExit, match='knows no text'):
        fold([
            *common, '--out',
            str(tmp_path / 'new.pth'), '--classes',
            str(tmp_path / 'new.txt'), '--embeddings',
            str(tmp_path / 'new.st')
        ])
    assert not (tmp_path / 'new.pth').exists()
