# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""LSeg's network as its authors released it, at a small size."""
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmseg.registry import MODELS
from network_tester import CONFIGS, load_config, samples
from tiny import CONTROL, stir, tiny_config
from torch import nn

from mmseg_textkd.deploy import fold_state_dict, to_stock_cfg, verify
from mmseg_textkd.models import LSegDPTHead, LSegTextClassifier

pytestmark = pytest.mark.stacks

BN = dict(type='BN')
EXACT = dict(type='LSegTextClassifier', half_precision=False)


@pytest.fixture
def text(make_embeddings):
    file = make_embeddings(4, 16, ('others', 'cat', 'dog', 'cow'))
    return dict(type='ClassEmbeddings', file=file, num_classes=4)


def small(name, text, **changes):
    """A network of the configs with few and narrow layers."""
    cfg = load_config(next((CONFIGS / 'lseg').glob(f'lseg_dpt_{name}*.py')))
    model = cfg.model.to_dict()
    backbone, head = model['backbone'], model['decode_head']
    backbone.pop('init_cfg', None)
    head.update(norm_cfg=BN, channels=8, text=text, **changes)
    if backbone['type'] == 'ResNet':
        widths = (16, 32, 64, 128)
        backbone.update(base_channels=4, stem_channels=4, norm_cfg=BN)
        head.update(in_channels=widths, post_process_channels=widths)
    else:
        backbone.update(img_size=64, embed_dims=24, num_heads=2, num_layers=4)
        backbone.update(out_indices=(0, 1, 2, 3))
        head.update(in_channels=(24, ) * 4, embed_dims=24)
        head.update(post_process_channels=(8, 12, 16, 20))
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

    def conv(x, name, call=F.conv2d, **options):
        weight, bias = state[f'{name}.weight'], state.get(f'{name}.bias')
        return call(x, weight, bias, **options)

    def joined(number, tokens, readout):
        patch, name = model.backbone.patch_size, 'reassemble_blocks.'
        read = readout[..., None, None].expand_as(tokens)
        both = torch.cat([tokens, read], 1).movedim(1, -1)
        x = conv(both, f'{name}readout_projects.{number}.0', F.linear)
        x = F.gelu(x).movedim(-1, 1)
        x = conv(x, f'{name}projects.{number}.conv')
        factor = patch / (4, 8, 16, 32)[number]
        name += f'resize_layers.{number}'
        if factor > 1:  # kernel and stride alike
            assert state[f'{name}.weight'].shape[2:] == (factor, factor)
            return conv(x, name, F.conv_transpose2d, stride=int(factor))
        return conv(x, name, stride=2, padding=1) if factor < 1 else x

    def unit(x, name):
        y = x
        for part in (f'{name}.conv1', f'{name}.conv2'):
            y = conv(y.relu(), f'{part}.conv', padding=1)
            mean, var, weight, bias = (
                state[f'{part}.bn.{key}']
                for key in ('running_mean', 'running_var', 'weight', 'bias'))
            y = F.batch_norm(y, mean, var, weight, bias)
        return x + y

    def double(x):
        return F.interpolate(
            x, scale_factor=2, mode='bilinear', align_corners=True)

    maps, x = model.backbone(image), None
    if isinstance(maps[0], (list, tuple)):
        maps = [joined(i, *pair) for i, pair in enumerate(maps)]
    for number, i in enumerate((3, 2, 1, 0)):
        y = conv(maps[i], f'convs.{i}.conv', padding=1)
        name = f'fusion_blocks.{number}'
        x = y if x is None else x + unit(y, f'{name}.res_conv_unit1')
        x = double(unit(x, f'{name}.res_conv_unit2'))
        x = conv(x, f'{name}.project.conv')
    pixels = conv(x, 'conv_seg.projection.conv')
    text = model.decode_head.text_branch.text()[..., None, None]
    return double(F.conv2d(pixels / pixels.norm(dim=1, keepdim=True),
                           text)) / .07


@pytest.mark.parametrize('name', ['vit-l16', 'vit-b32', 'r101'])
def test_network_is_the_published_one(text, name):
    model = small(name, text, text_branch=EXACT)
    image = torch.randn(2, 3, 64, 128)
    size = dict(img_shape=(64, 128), ori_shape=(64, 128))
    metas = [dict(size, class_id=k) for k in (2, 0)]
    with torch.no_grad():
        expected = written_out(model, image)
        found = model.inference(image, metas)
    if name == 'r101':  # of each image the others and its class
        rows = torch.tensor([[0, 3], [0, 1]])
        expected = expected[torch.arange(2)[:, None], rows]
    assert expected.std() > .1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    provider = model.decode_head.text_branch.text
    assert torch.equal(provider.compute(), provider())


def test_products_are_rounded_as_released(text):
    """In half precision, scale first; not in training."""
    module = LSegTextClassifier(8, 4, text).eval()
    pixels = F.normalize(torch.randn(1, 16, 5, 6), dim=1)
    vectors, scale = module.text(), torch.tensor(1 / .07).half()
    rows = vectors[..., None, None]
    expected = F.conv2d((scale * pixels.half()).double(), rows.half().double())
    found = module.classify(pixels, vectors)
    # To the next number of half precision.
    assert torch.equal(found, found.half().float())
    assert ((found - expected).abs() <= expected.abs() * 2**-11 + 1e-6).all()
    exact = F.conv2d(pixels, rows) / .07
    assert (found - exact).abs().max() > 1e-4
    torch.testing.assert_close(
        module.train().classify(pixels, vectors), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize('kind', ['TwoWayBridge', 'ContextAwareText'])
def test_a_fusion_counts_where_products_are_rounded(text, kind):
    fusion = dict(type=kind, width=8, num_heads=2, use='inference')
    module = stir(LSegTextClassifier(8, 4, text, fusion=fusion)).eval()
    feat = torch.randn(1, 8, 6, 6)
    rounded, module.half_precision = module(feat), False
    torch.testing.assert_close(rounded, module(feat), atol=.1, rtol=0)


def test_the_norm_is_kept_on_request(text, tmp_path):
    cfg = tiny_config(tmp_path, CONTROL)
    cfg.model.decode_head.text_branch = dict(type='LSegTextClassifier')
    model = stir(MODELS.build(cfg.model)).eval()
    stock = to_stock_cfg(cfg, keep_l2=True)
    verify(model, stock, fold_state_dict(model, keep_l2=True))
    assert model.decode_head.text_branch.half_precision


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
    branch, inputs = model.decode_head.text_branch, []
    branch.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    image, data = torch.randn(2, 3, 64, 64), samples((64, 64), 2)
    for sample, k in zip(data, (1, 2)):
        sample.set_metainfo(dict(class_id=k))
        sample.gt_sem_seg.data %= 255
    loss = model.loss(image, data)['decode.loss_ce']
    loss.backward()
    pixels = F.normalize(branch.projection.conv(inputs[0]), dim=1)
    vectors = branch.text()[torch.tensor([[0, 2], [0, 3]])]
    products = torch.einsum('nkd,ndhw->nkhw', vectors, pixels) / .07
    products = F.interpolate(
        products, size=(64, 64), mode='bilinear', align_corners=True)
    labels = torch.cat([s.gt_sem_seg.data for s in data])
    torch.testing.assert_close(
        loss, F.cross_entropy(products, labels), atol=1e-5, rtol=1e-5)
    assert branch.episode is None
    assert branch.projection.conv.weight.grad.abs().max() > 0


def test_episodes_take_no_losses_on_the_text_of_all(text):
    noise = dict(
        type='ControlEmbeddings',
        kind='noise',
        phrases=2,
        cosine=.9,
        embeddings=text)
    for changes in (dict(text_losses=[dict(type='TextAlignmentLoss')]),
                    dict(fusion=dict(type='ContextAwareText', num_heads=2)),
                    dict(text=noise)):
        with pytest.raises(ValueError, match='LSegEpisodeHead takes no'):
            small('r101', **dict(dict(text=text), **changes))


def test_faults_are_named(text):
    model = small('r101', text)
    image = torch.randn(1, 3, 64, 64)
    meta = dict(img_shape=(64, 64), ori_shape=(64, 64))
    with pytest.raises(KeyError, match='needs the `class_id` of each image'):
        model.inference(image, [meta])
    with pytest.raises(ValueError, match=r'3 classes, but .* \[3\]'):
        model.inference(image, [dict(meta, class_id=3)])
    assert model.decode_head.text_branch.episode is None
    options = dict(text=text, channels=8, num_classes=4, in_channels=(8, ) * 4)
    options.update(in_index=range(4), input_transform='multiple_select')
    for changes, fault in (
        (dict(patch_size=14), 'must be 16, 32 or None'),
        (dict(post_process_channels=(8, 8)), 'joins four maps'),
        (dict(patch_size=None), r'its `in_channels` \[8, 8, 8, 8\]'),
    ):
        with pytest.raises(ValueError, match=fault):
            LSegDPTHead(**{**options, **changes})
