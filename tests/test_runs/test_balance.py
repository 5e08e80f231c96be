# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""A balanced network from training to new words and to the release."""
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.apis import inference_model, init_model
from mmseg.registry import MODELS
from processes import load
from tiny import CLASSES, SIZE, assert_apart, run, tiny_config
from tool_modules import load_tool

from mmseg_textkd import zero_shot
from mmseg_textkd.apis import TextSegInferencer
from mmseg_textkd.deploy import BalancedConvSeg, to_stock_cfg
from mmseg_textkd.models import BalancedTextClassifier
from mmseg_textkd.text.encode_classes import encode_classes

UNSEEN = ['car', 'truck']
SEEN = [name not in UNSEEN for name in CLASSES]
SIZES = dict(embed_dims=64, num_layers=3, patch_size=8, grid_size=4)
TOWER = dict(SIZES, model='toyclip', out_dims=64, scale=1., surgery_blocks=1)
TEACHER = dict(TOWER, type='FrozenCLIPTeacher')


def config(root):
    """Two iterations with two hidden classes."""
    file = root / 'toy.safetensors'
    encode_classes(list(CLASSES), 'toyclip', 'photo').save(file)
    text = dict(type='ClassEmbeddings', file=str(file))
    cfg = tiny_config(root, text, {}, 2)
    branch, cfg.train_dataloader, cfg.val_evaluator = zero_shot(
        cfg.train_dataloader, 'toy_scenes', UNSEEN, before='PackSegInputs')
    cfg.test_evaluator = cfg.val_evaluator
    cfg.model.type = 'DistilledEncoderDecoder'
    cfg.model.teacher = TEACHER
    cfg.model.decode_head.text_branch = dict(
        branch, type='BalancedTextClassifier', clip_scale=15.88)
    cfg.custom_hooks.append(dict(type='TeacherHook'))
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    return cfg


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp('balance')
    cfg = config(root)
    runner = run(cfg)
    cfg.dump(root / 'config.py')
    return root, runner


@pytest.mark.stacks
def test_run(trained):
    root, runner = trained
    scalars = runner.message_hub.log_scalars
    losses = scalars['train/decode.loss_image_embedding'].data[0]
    assert len(losses) == 2 and np.isfinite(losses).all() and losses.min() > 0
    metrics = {k.rsplit('/')[-1] for k in scalars}
    assert {'mIoU_seen', 'mIoU_unseen'} <= metrics
    # The teacher is nowhere, and as it was.
    model, tower = runner.model, runner.model.teacher.tower
    assert_apart(runner, tower.parameters())
    assert_apart(runner, tower.network.parameters())
    saved = load(root / 'work/iter_2.pth')['state_dict']
    assert not any('teacher' in k or 'tower' in k for k in saved)
    fresh = MODELS.build(TEACHER)
    fresh.tower.init_weights()
    assert fresh.checksum() == model.teacher.checksum()
    # The image projection has learned.
    start = MODELS.build(config(root).model).state_dict()
    key = 'decode_head.conv_seg.image_projection.bn.bias'
    assert start[key].abs().max() == 0 and saved[key].abs().max() > 0


def test_new_words_are_balanced(trained):
    root, _ = trained
    files = str(root / 'config.py'), str(root / 'work/iter_2.pth')
    picture = str(root / 'data/img/0.png')
    model = init_model(*files, device='cpu')
    assert type(model.decode_head.conv_seg) is BalancedTextClassifier
    mine = TextSegInferencer(*files, device='cpu')
    mine.show_progress = False
    conv = mine.model.decode_head.conv_seg
    assert type(conv) is BalancedConvSeg and conv.seen.tolist() == SEEN
    expected = inference_model(model, picture)
    found = inference_model(mine.model, picture)
    torch.testing.assert_close(
        found.seg_logits.data, expected.seg_logits.data, rtol=1e-4, atol=1e-4)
    assert np.array_equal(
        mine(picture)['predictions'], expected.pred_sem_seg.data[0].numpy())
    # Trained, hidden and new ones: only the first count as seen.
    mine.set_classes(['road', 'truck', 'tree', 'bus stop'])
    conv = mine.model.decode_head.conv_seg
    assert conv.seen.tolist() == [True, False, False, False]
    expected = inference_model(mine.model, picture)
    labels = mine(picture, similarity=['tree'])['predictions']
    assert np.array_equal(labels, expected.pred_sem_seg.data[0].numpy())
    # By hand, from the weights of the checkpoint.
    classifier = model.decode_head.conv_seg
    feat = torch.randn(1, 16, 3, 4)

    def shares(scale, pixels):
        logits = torch.einsum('kd,ndhw->nkhw', mine.vectors, pixels)
        return (scale * logits).softmax(1)

    with torch.no_grad():
        a = shares(classifier.scale(), classifier.projection(feat))
        d = shares(15.88, classifier.image_projection(feat))
        scores = conv(feat).exp()
    torch.testing.assert_close(
        scores[:, 0], a[:, 0]**.7 * d[:, 0]**.3, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scores[:, 1:], d[:, 1:], rtol=1e-3, atol=1e-5)
    # Where all have been seen there is nothing to balance.
    mine.set_classes(['road', 'sky'])
    assert type(mine.model.decode_head.conv_seg) is torch.nn.Conv2d


def test_release_is_stock(trained, tmp_path, capsys):
    root, runner = trained
    cfg = Config.fromfile(root / 'config.py')
    stock = to_stock_cfg(cfg)
    assert stock.model == to_stock_cfg(tiny_config(root)).model
    made = str(tmp_path / 'stock.pth'), '--device', 'cpu', '--num-images', '2'
    load_tool('model_converters/textkd2mmseg.py').main(
        [f'{root}/config.py', f'{root}/work/iter_2.pth', *made])
    said = capsys.readouterr().out
    assert 'The balance for the classes without labels is left out' in said
    state = load(tmp_path / 'stock.pth')['state_dict']
    assert not any('projection' in k for k in state)
    model = init_model(
        str(tmp_path / 'stock.py'), str(tmp_path / 'stock.pth'), device='cpu')
    ours = runner.model.eval()
    inputs = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        balanced = ours(inputs)
        ours.decode_head.conv_seg.balance = dict(alpha=0., beta=0.)
        plain = ours(inputs)
        ours.decode_head.conv_seg.balance = dict(alpha=.3, beta=1.)
        torch.testing.assert_close(model(inputs), plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(balanced, plain, atol=.1)
