# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The frozen towers against open_clip and timm, and how they are loaded."""
import copy

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from safetensors.torch import save_file
from tiny_clip import save_model

from mmseg_textkd.clip import TextTower
from mmseg_textkd.clip.clip_features import resize_position
from mmseg_textkd.clip.weights import TextTowerError
from mmseg_textkd.models.ebseg import FrozenCLIPViT, FrozenSAMViT

SIZES = dict(
    embed_dims=64, num_layers=3, patch_size=8, grid_size=4, out_dims=64)
SAM = dict(
    img_size=32,
    patch_size=8,
    embed_dim=16,
    depth=6,
    num_heads=2,
    window_size=2,
    global_attn_indexes=(1, 2, 4, 5),
    use_rel_pos=True,
    neck_chans=8,
    num_classes=0)
SAM_SIZES = dict(patch_size=8, embed_dims=16, grid_size=4)


@pytest.fixture(scope='module')
def clip():
    """ToyCLIP's image tower, which sees images at their size."""
    tower = FrozenCLIPViT('toyclip', scale=1., **SIZES)
    tower.init_weights()
    return tower


@pytest.fixture(scope='module')
def open_clip_model():
    """The same model by open_clip alone."""
    import open_clip

    from mmseg_textkd.clip.weights import TOY_CLIP
    return open_clip.create_model(f'local-dir:{TOY_CLIP}').eval()


@pytest.fixture
def pixels():
    """Two RGB images of the size that ToyCLIP was trained with."""
    return 255 * torch.rand(2, 3, 32, 32)


def test_the_class_token_is_open_clips_image_embedding(clip, open_clip_model,
                                                       pixels):
    found = clip(pixels)
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in (open_clip_model.visual.image_mean,
                  open_clip_model.visual.image_std))
    with torch.no_grad():
        expected = open_clip_model.encode_image((pixels / 255 - mean) / std)
    torch.testing.assert_close(
        found._project(found.states[-1][:, 0]), expected, atol=1e-5, rtol=1e-4)
    scale = open_clip_model.logit_scale.exp().item()
    assert found.logit_scale == pytest.approx(scale)


def test_without_surgery_the_patches_are_those_of_the_tower(clip, pixels):
    found = clip(pixels)
    dense = found.dense(0)
    assert dense.shape == (2, 64, 4, 4)
    expected = found._project(found.states[-1])[:, 1:]
    torch.testing.assert_close(dense.flatten(2).mT, expected)
    assert not torch.allclose(found.dense(2), dense)


def naive_attention(attn, query, keys, values, bias=None):
    """Multi-head attention of one image, in float64, head by head."""
    dim, heads = attn.embed_dim, attn.num_heads
    width = dim // heads
    (wq, wk, wv), (bq, bk, bv) = (
        p.double().chunk(3) for p in (attn.in_proj_weight, attn.in_proj_bias))
    q, k, v = query @ wq.T + bq, keys @ wk.T + bk, values @ wv.T + bv
    out = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = q[:, part] @ k[:, part].T / width**.5
        scores = scores if bias is None else scores + bias[h]
        out.append(scores.softmax(dim=1) @ v[:, part])
    weight, shift = (
        p.double() for p in (attn.out_proj.weight, attn.out_proj.bias))
    return torch.cat(out, dim=1) @ weight.T + shift


def norm(layer, x):
    return F.layer_norm(x, x.shape[-1:], layer.weight.double(),
                        layer.bias.double(), layer.eps)


@torch.no_grad()
def test_mask_attention_against_a_naive_computation(clip, pixels):
    found = clip(pixels)
    biases = 4 * torch.randn(2, 4, 3, 8, 8)  # a bias for each head
    embeddings = found.mask_attention(biases, first_block=1)
    # The largest of the four within a patch.
    masks = biases.unflatten(3, (4, 2)).unflatten(5, (4, 2)).amax((4, 6))
    network = clip.network
    for n in range(2):
        for q in range(3):
            token = found.states[1][n, :1].double()
            for i in (1, 2):
                block = network.transformer.resblocks[i]
                query = norm(block.ln_1, token)
                patches = norm(block.ln_1, found.states[i][n, 1:].double())
                keys = torch.cat([query, patches])
                bias = F.pad(masks[n, :, q].flatten(1), (1, 0))
                token = token + naive_attention(block.attn, query, keys, keys,
                                                bias.double())
                hidden = norm(block.ln_2, token)
                mlp = copy.deepcopy(block.mlp).double()
                token = token + mlp(hidden)
            expected = norm(network.ln_post, token) @ network.proj.double()
            torch.testing.assert_close(
                embeddings[n, q].double(), expected[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_surgery_against_a_naive_computation(clip, pixels):
    found, network = clip(pixels), clip.network
    dense = found.dense(2).flatten(2).mT
    for n in range(2):
        stream = found.states[1][n].double()
        for i in (1, 2):
            block = network.transformer.resblocks[i]
            x = norm(block.ln_1, found.states[i][n].double())
            # Queries and keys are the values.
            same = copy.deepcopy(block.attn)
            for p in (same.in_proj_weight, same.in_proj_bias):
                p.copy_(p.chunk(3)[2].repeat(*[3, 1][:p.dim()]))
            stream = stream + naive_attention(same, x, x, x)
        expected = norm(network.ln_post, stream[1:]) @ network.proj.double()
        torch.testing.assert_close(
            dense[n].double(), expected, atol=1e-4, rtol=1e-4)


def test_a_mask_is_embedded_by_its_own_pixels_alone(clip, pixels):
    masks = torch.full((2, 2, 4, 4), -1e4)
    masks[:, 0, :, :2] = masks[:, 1, :, 2:] = 1e4
    found = clip(pixels)
    embeddings = found.mask_attention(masks, first_block=2)
    # Tokens outside the mask, and other masks, do not matter.
    states = [s.clone() for s in found.states]
    states[2][:, 1:].unflatten(1, (4, 4))[:, :, 2:] = 7.
    found.states = tuple(states)
    other = found.mask_attention(masks, first_block=2)
    torch.testing.assert_close(other[:, 0], embeddings[:, 0])
    assert not torch.allclose(other[:, 1], embeddings[:, 1])
    alone = found.mask_attention(masks[:, :1], first_block=2)
    torch.testing.assert_close(alone[:, 0], other[:, 0])


def test_positions_are_interpolated_and_trained(clip):
    token, grid = clip.positional_embedding[0], clip.positional_embedding[1:]
    assert torch.equal(
        resize_position(clip.positional_embedding, (4, 4), (4, 4)),
        clip.positional_embedding)
    wide = resize_position(clip.positional_embedding, (4, 4), (6, 3))
    assert wide.shape == (19, 64) and torch.equal(wide[0], token)
    expected = F.interpolate(
        grid.T.reshape(1, 64, 4, 4), (6, 3), mode='bicubic')
    torch.testing.assert_close(wide[1:].T.reshape(1, 64, 6, 3), expected)
    resize_position(clip.positional_embedding, (4, 4), (6, 3)).sum().backward()
    assert clip.positional_embedding.grad.abs().sum() > 0
    clip.positional_embedding.grad = None


def test_the_tower_sees_a_fraction_of_the_image():
    tower = FrozenCLIPViT('toyclip', scale=.7, **SIZES)
    taken = []
    tower.network.conv1.register_forward_pre_hook(
        lambda module, args: taken.append(args[0]))
    pixels = 255 * torch.rand(1, 3, 65, 96)
    # 45.5 and 67.2 pixels; what is no whole patch is let go.
    assert tower(pixels).size == (5, 8)
    small = tower.normalize(pixels)
    torch.testing.assert_close(taken[0],
                               F.interpolate(small, None, .7, 'bilinear'))
    # All of the image, as a teacher needs it.
    assert tower(pixels, cover=True).size == (6, 8)
    torch.testing.assert_close(
        taken[1],
        F.interpolate(small, (48, 64), mode='bilinear', antialias=True))
    assert tower(pixels[..., :3, :3], cover=True).size == (1, 1)


def test_sam_gives_its_blocks_of_global_attention(tmp_path):
    tower = FrozenSAMViT(SAM, seed=3, **SAM_SIZES)
    network = tower.network
    with torch.no_grad():
        network.pos_embed.normal_()
        tower.positional_embedding.copy_(network.pos_embed)
        for block in network.blocks:
            for name in ('rel_pos_h', 'rel_pos_w'):
                getattr(block.attn, name).normal_()
    # At its own size timm interpolates nothing.
    pixels = 255 * torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = network.forward_intermediates(
            tower.normalize(pixels), [1, 2, 4, 5], intermediates_only=True)
    for own, theirs, scale in zip(tower(pixels), expected, (4, 2, 1, .5)):
        assert own.shape == (1, 16, 4 * scale, 4 * scale)
        torch.testing.assert_close(
            own, F.interpolate(theirs, None, scale, 'bilinear'))
    assert network.blocks[0].norm1.eps == 1e-6
    # The position is interpolated and learns.
    wide = tower(255 * torch.rand(1, 3, 32, 64))
    assert wide[0].shape == (1, 16, 16, 32) and len(wide) == 4
    sum(x.square().sum() for x in wide).backward()
    assert tower.positional_embedding.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.parameters())


def test_random_weights_are_those_of_the_seed():
    tower = FrozenSAMViT(SAM, seed=3, **SAM_SIZES)
    tower.network
    torch.rand(5)
    again = FrozenSAMViT(SAM, seed=3, **SAM_SIZES)
    other = FrozenSAMViT(SAM, seed=4, **SAM_SIZES)
    assert again.checksum() == tower.checksum() != other.checksum()


def test_loading_does_not_disturb_the_random_state():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    FrozenSAMViT(SAM, seed=3, **SAM_SIZES).network
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture
def small_sam(monkeypatch):
    """Let timm's names give a small encoder; the real one has 90 M."""
    import timm
    from timm.models.vision_transformer_sam import VisionTransformerSAM
    monkeypatch.setattr(timm, 'create_model',
                        lambda name, **kwargs: VisionTransformerSAM(**SAM))
    return VisionTransformerSAM(**SAM)


@pytest.mark.parametrize('kind', ['timm', 'original'])
def test_sam_weights_from_a_local_file(small_sam, tmp_path, kind):
    state = {k: v + 1 for k, v in small_sam.state_dict().items()}
    if kind == 'timm':
        file = tmp_path / 'sam.safetensors'
        save_file(state, file)
    else:
        file = tmp_path / 'sam.pth'
        names = {k: k.replace('mlp.fc', 'mlp.lin') for k in state}
        torch.save(
            {
                'mask_decoder.x': torch.zeros(1),
                **{
                    f'image_encoder.{names[k]}': v
                    for k, v in state.items()
                }
            }, file)
    tower = FrozenSAMViT(pretrained=str(file), **SAM_SIZES)
    found = tower.network.state_dict()
    assert found.keys() == {k for k in state if not k.startswith('neck.')}
    assert all(torch.equal(v, state[k]) for k, v in found.items())
    assert torch.equal(tower.positional_embedding, state['pos_embed'])


def test_sam_weights_that_cannot_be_had(small_sam, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr('mmseg_textkd.clip.weights._offline', lambda: True)
    with pytest.raises(OSError, match="(?s)pretrained='FILE'"):
        FrozenSAMViT(cache_dir=str(tmp_path)).init_weights()
    with pytest.raises(FileNotFoundError, match='nowhere.pth'):
        FrozenSAMViT(pretrained='nowhere.pth').init_weights()
    broken = tmp_path / 'broken.safetensors'
    broken.write_bytes(b'no weights')
    with pytest.raises(OSError, match='damaged'):
        FrozenSAMViT(pretrained=str(broken)).init_weights()
    with pytest.raises(ValueError, match='samvit_base_patch16.sa1b'):
        FrozenSAMViT('samvit_tiny').init_weights()
    with pytest.raises(ValueError, match="'patch_size': 8"):
        FrozenSAMViT(SAM, seed=0).init_weights()
    three = dict(SAM, global_attn_indexes=(1, 2, 5))
    with pytest.raises(ValueError, match='has 3 blocks of global attention'):
        FrozenSAMViT(three, seed=0, **SAM_SIZES).init_weights()


@each_case('args', [
    dict(model=SAM),
    dict(model=SAM, seed=0, pretrained='x.pth'),
    dict(seed=0),
])
def test_sam_needs_weights_or_a_seed(args):
    with pytest.raises(ValueError, match='seed'):
        FrozenSAMViT(**args)


def test_clip_towers_that_do_not_fit(tmp_path):
    save_model(tmp_path / 'clip', 'clip')
    wrong = FrozenCLIPViT('toyclip', **dict(SIZES, num_layers=2))
    with pytest.raises(ValueError, match="'num_layers': 3"):
        wrong.init_weights()
    other = FrozenCLIPViT(f'local-dir:{tmp_path}/clip', **SIZES)
    with pytest.raises(ValueError, match="'embed_dims': 32"):
        other.init_weights()
    nowhere = FrozenCLIPViT('local-dir:/nowhere', **SIZES)
    with pytest.raises(TextTowerError, match='no such folder'):
        nowhere.init_weights()
    with pytest.raises(ValueError, match='scale'):
        FrozenCLIPViT('toyclip', scale=0., **SIZES)


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
    state = {k: v + 1 for k, v in clip.state_dict().items()}
    tower = FrozenCLIPViT('toyclip', scale=1., **SIZES)
    tower.load_state_dict(state)
    tower.init_weights()
    tower(torch.rand(1, 3, 32, 32))
    assert torch.equal(tower.positional_embedding,
                       state['positional_embedding'])
    torch.testing.assert_close(clip.positional_embedding,
                               clip.network.positional_embedding)
