# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The frozen towers against open_clip and timm, and how they are loaded."""
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from safetensors.torch import save_file
from tiny_clip import open_clip_model, save_model
from torch.testing import assert_close
from torchvision.transforms.functional import normalize

from mmseg_textkd.clip import TextTower
from mmseg_textkd.clip.weights import TOY_CLIP, TextTowerError
from mmseg_textkd.models.ebseg import FrozenCLIPViT, FrozenSAMViT

SIZES = dict(
    embed_dims=64, num_layers=3, patch_size=8, grid_size=4, out_dims=64)
SAM = dict(img_size=32, patch_size=8, embed_dim=16, depth=6, num_heads=2)
SAM.update(window_size=2, global_attn_indexes=(1, 2, 4, 5), use_rel_pos=True)
SAM.update(neck_chans=8, num_classes=0)
MEAN = (122.7709383, 116.7460125, 104.09373615)
SAM_SIZES = dict(patch_size=8, embed_dims=16, grid_size=4)


def clip_tower(model='toyclip', **options):
    """By default as of an image of the size that ToyCLIP was trained with."""
    return FrozenCLIPViT(model, **dict(SIZES, scale=1.) | options)


def sam_tower(seed=3):
    return FrozenSAMViT(SAM, seed=seed, **SAM_SIZES)


@pytest.fixture(scope='module')
def clip():
    """ToyCLIP's image tower, which sees images at their size."""
    tower = clip_tower()
    tower.init_weights()
    return tower


@pytest.fixture
def pixels():
    """Two RGB images of the size that ToyCLIP was trained with."""
    return 255 * torch.rand(2, 3, 32, 32)


@pytest.fixture
def found(clip, pixels):
    return clip(pixels)


def test_the_class_token_is_open_clips_image_embedding(found, pixels):
    model, _ = open_clip_model(TOY_CLIP)
    images = normalize(pixels / 255, model.visual.image_mean,
                       model.visual.image_std)
    with torch.no_grad():
        expected = model.encode_image(images)
    assert_close(
        found._project(found.states[-1][:, 0]), expected, atol=1e-5, rtol=1e-4)
    assert found.logit_scale == pytest.approx(model.logit_scale.exp().item())


def test_without_surgery_the_patches_are_those_of_the_tower(found):
    dense = found.dense(0)
    assert dense.shape == (2, 64, 4, 4)
    expected = found._project(found.states[-1])[:, 1:]
    assert_close(dense.flatten(2).mT, expected)
    assert not torch.allclose(found.dense(2), dense)


def naive_attention(attn, query, keys, bias=None):
    """Multi-head attention of one image, of PyTorch's own function."""
    weights, shifts = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    parts = map(F.linear, (query, keys, keys), weights, shifts)
    heads = (x.unflatten(1, (attn.num_heads, -1)) for x in parts)
    q, k, v = (x.transpose(0, 1) for x in heads)
    out = F.scaled_dot_product_attention(q, k, v, bias)
    return attn.out_proj(out.transpose(0, 1).flatten(1))


@torch.no_grad()
def test_mask_attention_against_a_naive_computation(clip, pixels):
    found, network = clip(pixels), copy.deepcopy(clip.network).double()
    biases = 4 * torch.randn(2, 4, 3, 8, 8)  # a bias for each head
    embeddings = found.mask_attention(biases, first_block=1)
    # The largest of the four within a patch.
    masks = F.max_pool2d(biases.flatten(1, 2), 2).view(2, 4, 3, 16).double()
    for n, q in itertools.product(range(2), range(3)):
        token = found.states[1][n, :1].double()
        for i in (1, 2):
            block = network.transformer.resblocks[i]
            query = block.ln_1(token)
            patches = block.ln_1(found.states[i][n, 1:].double())
            bias = F.pad(masks[n, :, q, None], (1, 0))
            token = token + naive_attention(block.attn, query,
                                            torch.cat([query, patches]), bias)
            token = token + block.mlp(block.ln_2(token))
        expected = network.ln_post(token) @ network.proj
        assert_close(
            embeddings[n, q].double(), expected[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_surgery_against_a_naive_computation(clip, pixels):
    found, network = clip(pixels), copy.deepcopy(clip.network).double()
    dense = found.dense(2).flatten(2).mT
    for n in range(2):
        stream = found.states[1][n].double()
        for i in (1, 2):
            block = network.transformer.resblocks[i]
            x = block.ln_1(found.states[i][n].double())
            # Queries and keys are the values.
            for p in (block.attn.in_proj_weight, block.attn.in_proj_bias):
                p.copy_(torch.cat([p.chunk(3)[2]] * 3))
            stream = stream + naive_attention(block.attn, x, x)
        expected = network.ln_post(stream[1:]) @ network.proj
        assert_close(dense[n].double(), expected, atol=1e-4, rtol=1e-4)


def test_a_mask_is_embedded_by_its_own_pixels_alone(found):
    masks = torch.full((2, 2, 4, 4), -1e4)
    masks[:, 0, :, :2] = masks[:, 1, :, 2:] = 1e4
    embeddings = found.mask_attention(masks, first_block=2)
    # Tokens outside the mask, and other masks, do not matter.
    states = [s.clone() for s in found.states]
    states[2][:, 1:].unflatten(1, (4, 4))[:, :, 2:] = 7.
    found.states = tuple(states)
    other = found.mask_attention(masks, first_block=2)
    assert_close(other[:, 0], embeddings[:, 0])
    assert not torch.allclose(other[:, 1], embeddings[:, 1])
    alone = found.mask_attention(masks[:, :1], first_block=2)
    assert_close(alone[:, 0], other[:, 0])


def test_positions_are_interpolated_and_trained(clip):
    position, taken = clip.positional_embedding, []
    handle = clip.network.ln_pre.register_forward_pre_hook(
        lambda module, args: taken.append(args[0][0]))
    for size in ((4, 4), (6, 3)):
        # Of an image of the mean color nothing but positions is left.
        mean = torch.tensor(MEAN).view(1, 3, 1, 1)
        clip(mean.expand(1, 3, 8 * size[0], 8 * size[1]))
    handle.remove()
    own, wide = (
        x - clip.network.class_embedding.expand(1, -1) *
        (torch.arange(len(x)) == 0)[:, None] for x in taken)
    assert_close(own, position)
    assert_close(wide[0], position[0])
    grid = position[1:].T.reshape(1, 64, 4, 4)
    expected = F.interpolate(grid, (6, 3), mode='bicubic')
    assert_close(
        wide[1:].T.reshape(1, 64, 6, 3), expected, atol=1e-5, rtol=1e-5)
    wide.sum().backward()
    assert position.grad.abs().sum() > 0
    position.grad = None


def test_the_tower_sees_a_fraction_of_the_image():
    tower, taken = clip_tower(scale=.7), []
    tower.network.conv1.register_forward_pre_hook(
        lambda module, args: taken.append(args[0]))
    pixels = 255 * torch.rand(1, 3, 65, 96)
    # 45.5 and 67.2 pixels; what is no whole patch is let go.
    assert tower(pixels).size == (5, 8)
    # All of the image, as a teacher needs it.
    assert tower(pixels, cover=True).size == (6, 8)
    small = tower.normalize(pixels)
    expected = F.interpolate(small, None, .7, 'bilinear')
    assert_close(taken[0], expected)
    expected = F.interpolate(small, (48, 64), mode='bilinear', antialias=True)
    assert_close(taken[1], expected)
    assert tower(pixels[..., :3, :3], cover=True).size == (1, 1)


def test_sam_gives_its_blocks_of_global_attention(tmp_path):
    tower = sam_tower()
    network = tower.network
    with torch.no_grad():
        network.pos_embed.normal_()
        tower.positional_embedding.copy_(network.pos_embed)
        for block in network.blocks:
            block.attn.rel_pos_h.normal_()
            block.attn.rel_pos_w.normal_()
        # At its own size timm interpolates nothing.
        pixels = 255 * torch.rand(1, 3, 32, 32)
        expected = network.forward_intermediates(
            tower.normalize(pixels), [1, 2, 4, 5], intermediates_only=True)
    for own, theirs, scale in zip(tower(pixels), expected, (4, 2, 1, .5)):
        assert own.shape == (1, 16, 4 * scale, 4 * scale)
        assert_close(own, F.interpolate(theirs, None, scale, 'bilinear'))
    assert network.blocks[0].norm1.eps == 1e-6
    # The position is interpolated and learns.
    wide = tower(255 * torch.rand(1, 3, 32, 64))
    assert wide[0].shape == (1, 16, 16, 32) and len(wide) == 4
    sum(x.square().sum() for x in wide).backward()
    assert tower.positional_embedding.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.parameters())


def test_random_weights_are_those_of_the_seed():
    state = torch.get_rng_state()
    checksum = sam_tower().checksum()
    # Loading does not disturb the random state.
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert sam_tower().checksum() == checksum != sam_tower(seed=4).checksum()


@pytest.fixture
def small_sam(monkeypatch):
    """Let timm's names give a small encoder; the real one has 90 M."""
    import timm
    from timm.models.vision_transformer_sam import VisionTransformerSAM
    monkeypatch.setattr(timm, 'create_model',
                        lambda name, **kwargs: VisionTransformerSAM(**SAM))
    return VisionTransformerSAM(**SAM)


@each_case('kind', ['timm', 'original'])
def test_sam_weights_from_a_local_file(small_sam, tmp_path, kind):
    state = {k: v + 1 for k, v in small_sam.state_dict().items()}
    file = tmp_path / 'sam.safetensors'
    if kind == 'timm':
        save_file(state, file)
    else:
        file = tmp_path / 'sam.pth'
        theirs = {
            f'image_encoder.{k.replace("mlp.fc", "mlp.lin")}': v
            for k, v in state.items()
        }
        torch.save({'mask_decoder.x': torch.zeros(1), **theirs}, file)
    tower = FrozenSAMViT(pretrained=str(file), **SAM_SIZES)
    found = tower.network.state_dict()
    assert found.keys() == {k for k in state if not k.startswith('neck.')}
    assert all(torch.equal(v, state[k]) for k, v in found.items())
    assert torch.equal(tower.positional_embedding, state['pos_embed'])


def test_sam_weights_that_cannot_be_had(small_sam, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr('mmseg_textkd.clip.weights._offline', lambda: True)
    broken = tmp_path / 'broken.safetensors'
    broken.write_bytes(b'no weights')
    three = dict(SAM, global_attn_indexes=(1, 2, 5))
    cases = [
        (dict(cache_dir=str(tmp_path)), OSError, "(?s)pretrained='FILE'"),
        (dict(pretrained='nowhere.pth'), FileNotFoundError, 'nowhere.pth'),
        (dict(pretrained=str(broken)), OSError, 'damaged'),
        (dict(model='samvit_tiny'), ValueError, 'samvit_base_patch16.sa1b'),
        (dict(model=SAM, seed=0), ValueError, "'patch_size': 8"),
        (dict(SAM_SIZES, model=three,
              seed=0), ValueError, 'has 3 blocks of global attention'),
        # Weights or a seed.
        (dict(model=SAM), ValueError, 'seed'),
        (dict(model=SAM, seed=0, pretrained='x.pth'), ValueError, 'seed'),
        (dict(seed=0), ValueError, 'seed'),
    ]
    for args, error, message in cases:
        with pytest.raises(error, match=message):
            FrozenSAMViT(**args).init_weights()


def test_clip_towers_that_do_not_fit(tmp_path):
    save_model(tmp_path / 'clip', 'clip')
    cases = [
        (dict(num_layers=2), ValueError, "'num_layers': 3"),
        (dict(model=f'local-dir:{tmp_path}/clip'), ValueError,
         "'embed_dims': 32"),
        (dict(model='local-dir:/nowhere'), TextTowerError, 'no such folder'),
        (dict(scale=0.), ValueError, 'scale'),
    ]
    for args, error, message in cases:
        with pytest.raises(error, match=message):
            clip_tower(**args).init_weights()


def test_towers_are_not_in_the_module_tree_and_copies_share_them(clip):
    assert list(clip.state_dict()) == ['positional_embedding']
    assert [n for n, _ in clip.named_parameters()] == ['positional_embedding']
    twin = copy.deepcopy(clip)
    assert twin.network is clip.network
    assert twin.positional_embedding is not clip.positional_embedding
    assert not clip.network.training and not clip.train().network.training
    assert not any(p.requires_grad for p in clip.network.parameters())
    # The text side of the same model is another module.
    assert TextTower('toyclip').checksum() != clip.checksum()


def test_a_loaded_checkpoint_keeps_its_positions(clip):
    position = clip.positional_embedding
    assert_close(position, clip.network.positional_embedding)
    tower = clip_tower()
    tower.load_state_dict(dict(positional_embedding=position + 1))
    tower.init_weights()
    tower(torch.rand(1, 3, 32, 32))
    assert torch.equal(tower.positional_embedding, position + 1)
