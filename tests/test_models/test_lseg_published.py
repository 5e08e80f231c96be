# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""LSeg's network as its authors released it, at a small size."""
import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from network_tester import CONFIGS, load_config
from torch import nn

from mmseg_textkd.models import LSegDPTHead, LSegTextClassifier

pytestmark = pytest.mark.stacks

NAMES = ('others', 'cat', 'dog', 'cow')


@pytest.fixture
def text(make_embeddings):
    return dict(
        type='ClassEmbeddings',
        file=make_embeddings(4, 16, NAMES),
        num_classes=4)


def small(name, text, **changes):
    """A network of the configs with few and narrow layers."""
    cfg = load_config(next((CONFIGS / 'lseg').glob(f'lseg_dpt_{name}*.py')))
    model = cfg.model.to_dict()
    backbone, head = model['backbone'], model['decode_head']
    backbone.pop('init_cfg', None)
    head.update(norm_cfg=dict(type='BN'), channels=8, text=text, **changes)
    if backbone['type'] == 'ResNet':
        backbone.update(
            base_channels=4, stem_channels=4, norm_cfg=dict(type='BN'))
        head.update(
            in_channels=(16, 32, 64, 128),
            post_process_channels=(16, 32, 64, 128))
    else:
        backbone.update(
            img_size=64,
            embed_dims=24,
            num_heads=2,
            num_layers=4,
            out_indices=(0, 1, 2, 3))
        head.update(
            in_channels=(24, ) * 4,
            embed_dims=24,
            post_process_channels=(8, 12, 16, 20))
    if head['type'] == 'LSegDPTHead':
        head['num_classes'] = 4
    model['test_cfg'] = ConfigDict(mode='whole')
    model['data_preprocessor'].pop('test_cfg')
    torch.manual_seed(0)
    model = MODELS.build(model)
    for param in model.parameters():
        param.data += .1 * torch.randn_like(param)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += .1 * torch.randn_like(module.running_mean)
            module.running_var += torch.rand_like(module.running_var)
    return model.eval()


def written_out(model, image):
    """The published network, written out from its description.

    Tokens of four blocks, each joined with the readout token; brought to the
    strides 4 to 32; fused from the deepest on, by two residual units and
    doubling; then head1, cosines, and doubling.
    """
    state = dict(model.decode_head.state_dict())
    maps = model.backbone(image)
    if isinstance(maps[0], (list, tuple)):
        patch = model.backbone.patch_size
        joined = []
        for i, (tokens, readout) in enumerate(maps):
            read = f'reassemble_blocks.readout_projects.{i}.0.'
            both = torch.cat(
                [tokens, readout[..., None, None].expand_as(tokens)],
                1).movedim(1, -1)
            x = F.gelu(
                F.linear(both, state[read + 'weight'],
                         state[read + 'bias'])).movedim(-1, 1)
            name = f'reassemble_blocks.projects.{i}.conv.'
            x = F.conv2d(x, state[name + 'weight'], state[name + 'bias'])
            name = f'reassemble_blocks.resize_layers.{i}.'
            factor = patch / (4, 8, 16, 32)[i]
            if factor > 1:
                weight = state[name + 'weight']
                assert weight.shape[2:] == (factor, factor)
                x = F.conv_transpose2d(
                    x, weight, state[name + 'bias'], stride=int(factor))
            elif factor < 1:
                x = F.conv2d(
                    x,
                    state[name + 'weight'],
                    state[name + 'bias'],
                    stride=2,
                    padding=1)
            joined.append(x)
        maps = joined

    def unit(x, name):
        y = x
        for conv in ('conv1', 'conv2'):
            y = F.conv2d(
                y.relu(), state[f'{name}.{conv}.conv.weight'], padding=1)
            bn = f'{name}.{conv}.bn.'
            y = F.batch_norm(y, state[bn + 'running_mean'],
                             state[bn + 'running_var'], state[bn + 'weight'],
                             state[bn + 'bias'])
        return x + y

    def double(x):
        return F.interpolate(
            x, scale_factor=2, mode='bilinear', align_corners=True)

    x = None
    for number, i in enumerate((3, 2, 1, 0)):
        y = F.conv2d(maps[i], state[f'convs.{i}.conv.weight'], padding=1)
        name = f'fusion_blocks.{number}.'
        x = y if x is None else x + unit(y, name + 'res_conv_unit1')
        x = double(unit(x, name + 'res_conv_unit2'))
        x = F.conv2d(x, state[name + 'project.conv.weight'],
                     state[name + 'project.conv.bias'])
    name = 'conv_seg.projection.conv.'
    pixels = F.conv2d(x, state[name + 'weight'], state[name + 'bias'])
    text = model.decode_head.text_branch.text()
    logits = torch.einsum('kd,ndhw->nkhw', text,
                          pixels / pixels.norm(dim=1, keepdim=True)) / .07
    return double(logits)


@pytest.mark.parametrize('name', ['vit-l16', 'vit-b32', 'r101'])
def test_network_is_the_published_one(text, name):
    episodes = name == 'r101'
    model = small(
        name,
        text,
        text_branch=dict(type='LSegTextClassifier', half_precision=False))
    image = torch.randn(2, 3, 64, 128)
    metas = [
        dict(img_shape=(64, 128), ori_shape=(64, 128), class_id=k)
        for k in (2, 0)
    ]
    with torch.no_grad():
        expected = written_out(model, image)
        found = model.inference(image, metas)
    if episodes:  # of each image the others and its class
        rows = torch.tensor([[0, 3], [0, 1]])
        expected = expected[torch.arange(2)[:, None], rows]
    assert expected.std() > .1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert all(
        torch.equal(p, q)
        for p, q in zip(model.decode_head.text_branch.text.compute(),
                        model.decode_head.text_branch.text()))


def test_products_are_rounded_as_released(text):
    """In half precision, scale first; not in training."""
    torch.manual_seed(0)
    module = LSegTextClassifier(8, 4, text).eval()
    pixels = F.normalize(torch.randn(1, 16, 5, 6), dim=1)
    vectors = module.text()
    scale = torch.tensor(1 / .07)
    expected = torch.einsum('kd,ndhw->nkhw',
                            vectors.half().double(),
                            (scale.half() * pixels.half()).double())
    found = module.classify(pixels, vectors)
    # To the next number of half precision.
    assert torch.equal(found, found.half().float())
    assert ((found - expected).abs() <= expected.abs() * 2**-11 + 1e-6).all()
    exact = torch.einsum('kd,ndhw->nkhw', vectors, pixels) / .07
    assert (found - exact).abs().max() > 1e-4
    torch.testing.assert_close(
        module.train().classify(pixels, vectors), exact, atol=1e-5, rtol=0)


def test_blocks_follow_the_rounded_products(text):
    blocks = dict(kind='bottleneck', depth=2)
    module = LSegTextClassifier(8, 4, text, regularization=blocks).eval()
    plain = LSegTextClassifier(8, 4, text).eval()
    for param in module.regularization.parameters():
        param.data += .1 * torch.randn_like(param)
    plain.projection.load_state_dict(module.projection.state_dict())
    feat = torch.randn(1, 8, 5, 6)
    torch.testing.assert_close(
        module(feat), module.regularization(plain(feat)), atol=0, rtol=0)


def test_episodes_learn_with_their_own_classes(text):
    """Losses and gradients are those of two rows of text for each image."""
    model = small('r101', text, dropout_ratio=0.).train()
    torch.manual_seed(1)
    image = torch.randn(2, 3, 64, 64)
    samples = []
    for k in (1, 2):
        sample = SegDataSample(metainfo=dict(class_id=k))
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 2, (1, 64, 64)))
        samples.append(sample)
    # Training moves nothing that the comparison needs.
    twin = copy.deepcopy(model)
    loss = model.loss(image, samples)['decode.loss_ce']
    loss.backward()
    head = twin.decode_head
    logits = []
    with torch.no_grad():
        feats = twin.extract_feat(image)
    every = head.text_branch
    for hook in (every.register_forward_pre_hook(
            lambda _, args: logits.append(args[0])), ):
        head.text_branch.episode = torch.tensor([1, 2])
        head(feats)
        hook.remove()
    pixels = F.normalize(every.projection.conv(logits[0]), dim=1)
    vectors = every.text()[torch.tensor([[0, 2], [0, 3]])]
    products = torch.einsum('nkd,ndhw->nkhw', vectors, pixels) / .07
    expected = F.cross_entropy(
        F.interpolate(
            products, size=(64, 64), mode='bilinear', align_corners=True),
        torch.stack([s.gt_sem_seg.data[0] for s in samples]))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert model.decode_head.text_branch.episode is None
    grad = model.decode_head.text_branch.projection.conv.weight.grad
    assert grad.abs().max() > 0


def test_faults_are_named(text):
    model = small('r101', text)
    image = torch.randn(1, 3, 64, 64)
    meta = dict(img_shape=(64, 64), ori_shape=(64, 64))
    with pytest.raises(KeyError, match='needs the `class_id` of each image'):
        model.inference(image, [meta])
    with pytest.raises(ValueError, match=r'3 classes, but .* \[3\]'):
        model.inference(image, [dict(meta, class_id=3)])
    assert model.decode_head.text_branch.episode is None
    options = dict(
        text=text,
        channels=8,
        num_classes=4,
        in_index=(0, 1, 2, 3),
        input_transform='multiple_select')
    for changes, fault in ((dict(patch_size=14), 'must be 16, 32 or None'),
                           (dict(post_process_channels=(8, 8)),
                            'joins four maps'),
                           (dict(patch_size=None),
                            r'its `in_channels` \[8, 8, 8, 8\]')):
        with pytest.raises(ValueError, match=fault):
            LSegDPTHead(in_channels=(8, ) * 4, **{**options, **changes})
