# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Run EBSeg's own code on random weights; started by ebseg.py.

Of Detectron2 only registries, `Conv2d`, `ImageList` and the resizing of
results are made anew; deformable attention is their own fallback in PyTorch.
Writes FOLDER/theirs.pth and, for each image of FOLDER/images.json, what their
network finds in it, as FOLDER/theirs_N.pt.
"""
import ast
import functools
import importlib
import json
import math
import sys
import types
from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor, nn

SEEN, NEW = 'coco_2017_test_stuff_sem_seg', 'ade20k_sem_seg_val'


class CfgNode(dict):
    __setattr__ = dict.__setitem__

    def __getattr__(self, key):
        try:
            return self[key]
        except KeyError as error:
            raise AttributeError(key) from error


class Registry(dict):

    def __init__(self, name):
        self.name = name

    def register(self, obj=None):
        if obj is None:
            return self.register
        self[obj.__name__] = obj
        return obj


class Conv2d(nn.Conv2d):

    def __init__(self, *args, norm=None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        x = super().forward(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


class ShapeSpec:

    def __init__(self, channels=None, height=None, width=None, stride=None):
        self.channels, self.stride = channels, stride


class ImageList:

    def __init__(self, tensor, sizes):
        self.tensor, self.image_sizes = tensor, sizes

    @staticmethod
    def from_tensors(images, divisor=1):
        sizes = [tuple(x.shape[-2:]) for x in images]
        height, width = (-(-max(s[i] for s in sizes) // divisor) * divisor
                         for i in (0, 1))
        return ImageList(
            torch.stack([
                F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))
                for x in images
            ]), sizes)


def configurable(init):

    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        if args and isinstance(args[0], CfgNode):
            args, kwargs = (), type(self).from_config(*args, **kwargs)
        init(self, *args, **kwargs)

    return wrapped


def postprocess(result, size, height, width):
    return F.interpolate(
        result[:, :size[0], :size[1]][None], (height, width),
        mode='bilinear',
        align_corners=False)[0]


def xavier(layer):
    nn.init.kaiming_uniform_(layer.weight, a=1)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def put(name: str, **content: Any) -> None:
    """Put a module where the reference imports it from."""
    module: Any = types.ModuleType(name)
    module.__dict__.update(content, __path__=[])
    sys.modules[name] = module
    parent, _, child = name.rpartition('.')
    if parent:
        setattr(sys.modules[parent], child, module)


def class_names(repo: Path) -> Dict[str, list]:
    """Read the names of the two data sets out of their files."""
    folder = repo / 'ebseg/data/datasets'
    source = (folder / 'register_coco_stuff_164k.py').read_text()
    seen, = ([c['name'] for c in ast.literal_eval(node.value)]
             for node in ast.parse(source).body
             if isinstance(node, ast.Assign)
             and getattr(node.targets[0], 'id', '') == 'COCO_CATEGORIES')
    lines = (folder / 'class_names' / f'{NEW}.txt').read_text().splitlines()
    new = [line.split(':')[1].strip().split(',')[0] for line in lines]
    return {SEEN: seen, SEEN.replace('test', 'train'): seen, NEW: new}


def stub(repo: Path) -> Tuple[Registry, Registry]:
    """Make what their model needs of Detectron2, fvcore and open_clip."""
    meta, heads = Registry('meta'), Registry('heads')
    names = class_names(repo)
    d2 = 'detectron2'
    put(d2)
    put(f'{d2}.config', configurable=configurable, CfgNode=CfgNode)
    put(f'{d2}.modeling',
        META_ARCH_REGISTRY=meta,
        SEM_SEG_HEADS_REGISTRY=heads,
        ShapeSpec=ShapeSpec,
        build_sem_seg_head=lambda cfg, shape: heads[cfg.MODEL.SEM_SEG_HEAD.NAME
                                                    ](cfg, shape))
    put(f'{d2}.modeling.postprocessing', sem_seg_postprocess=postprocess)
    put(f'{d2}.structures', ImageList=ImageList)
    put(f'{d2}.utils')
    put(f'{d2}.utils.memory', retry_if_cuda_oom=lambda f: f)
    put(f'{d2}.utils.logger', log_first_n=lambda *args, **kwargs: None)
    put(f'{d2}.utils.registry', Registry=Registry)
    put(f'{d2}.utils.comm', get_world_size=lambda: 1)
    put(f'{d2}.layers',
        ShapeSpec=ShapeSpec,
        Conv2d=Conv2d,
        get_norm=lambda norm, channels: nn.GroupNorm(32, channels),
        DeformConv=None)
    put(f'{d2}.data',
        MetadataCatalog=types.SimpleNamespace(
            get=lambda name: types.SimpleNamespace(stuff_classes=names[name])))
    put(f'{d2}.projects')
    put(f'{d2}.projects.point_rend')
    put(f'{d2}.projects.point_rend.point_features',
        point_sample=None,
        get_uncertain_point_coords_with_randomness=None)
    put('fvcore')
    put('fvcore.nn')
    put('fvcore.nn.weight_init', c2_xavier_fill=xavier, c2_msra_fill=None)
    put('MultiScaleDeformableAttention')
    # Without their __init__, which imports what only training needs.
    for name in ('ebseg', 'ebseg.utils'):
        put(name)
        sys.modules[name].__path__ = [str(repo / name.replace('.', '/'))]
    constants = types.SimpleNamespace(
        mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD)
    open_clip.create_model_and_transforms = lambda name, pretrained=None: (
        open_clip.create_model(name, force_quick_gelu=True), None,
        types.SimpleNamespace(transforms=[constants]))
    return meta, heads


def merge(node: CfgNode, values: Dict) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            merge(node.setdefault(key, CfgNode()), value)
        else:
            node[key] = value


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Leave nothing at 0 or 1, where a difference could hide."""
    generator = torch.Generator().manual_seed(0)
    for name, param in model.named_parameters():
        last = name.split('.')[-1]
        noise = torch.randn(param.shape, generator=generator)
        if name == 'ov_classifier.logit_scale':
            param.fill_(math.log(100.))
        elif name.startswith('ov_classifier.') and 'bg_embed' not in name:
            continue
        elif any(s in name for s in ('query', 'level_embed',
                                     'bias_scaling')) or param.dim() == 0:
            continue
        elif any(
                s in name
                for s in ('rel_pos', 'sampling_offsets', 'attention_weights')):
            param.copy_(.05 * noise)
        elif 'pos_embed' in name or 'positional_embedding' in name:
            param.copy_(.2 * noise)
        elif param.dim() == 1:
            param.copy_(1 + .1 * noise if last == 'weight' else param +
                        .05 * noise)
        else:
            fan = param[0].numel() if last != 'proj' else param.shape[0]
            gain = 1.
            if '.layers.' in name and 'predictor' in name:
                gain = 1.4
            elif ('proj.weight' in name
                  and 'attn' in name) or 'c_proj' in name or 'lin2' in name:
                gain = .5
            param.copy_(gain * fan**-.5 * noise)
    model.sem_seg_head.predictor.logit_scale.fill_(1.3)
    model.sem_seg_head.predictor.bias_scaling.weight.fill_(.7)


def build(repo: Path, large: bool) -> nn.Module:
    """Build their network at its configuration, with random weights."""
    stub(repo)
    sys.path.insert(0, str(repo))
    importlib.import_module('ebseg.model.mask2former.modeling')
    sam: Any = importlib.import_module('ebseg.model.segment_anything')
    from ebseg.config import add_ebseg_config
    from ebseg.model.EBSeg import EBSeg
    build_sam = sys.modules['ebseg.model.segment_anything.build_sam']
    sam.sam_model_registry['vit_b'] = lambda: build_sam.build_sam_vit_b(
        checkpoint=None)
    cfg = CfgNode(
        INPUT=CfgNode(CROP=CfgNode()),
        SOLVER=CfgNode(),
        MODEL=CfgNode(SEM_SEG_HEAD=CfgNode()))
    add_ebseg_config(cfg)
    for name in ('ebseg_b', 'ebseg_l')[:1 + large]:
        file = repo / f'configs/ebseg/{name}.yaml'
        merge(cfg, yaml.safe_load(file.read_text()))
    torch.manual_seed(0)
    model = EBSeg(cfg).eval()
    randomize(model)
    return model


def vectors(found: Dict[str, Tensor], number: int, seed: int) -> Tensor:
    """Make class vectors of what is in an image.

    With random vectors, random weights put one class everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    a, b = F.normalize(found['A'][0], dim=1), found['B'][0]
    queries = torch.randperm(len(a), generator=generator).repeat(2)[:number]
    noise = torch.randn(number, a.shape[1], generator=generator)
    mixed = sum(
        F.normalize(x, dim=1)
        for x in (a[queries] - a.mean(0), b[queries] - b.mean(0)))
    mixed += .3 * F.normalize(noise, dim=1)
    mean = F.normalize(found['dense'][0].flatten(1).mean(1), dim=0)
    common = torch.linalg.qr(torch.stack([a.mean(0), b.mean(0), mean], 1))[0]
    return F.normalize(mixed - mixed @ common @ common.T, dim=1)


@torch.no_grad()
def run(repo: str, work_dir: str, name: str) -> None:
    """Write what their network `name` finds in the images of a folder."""
    folder, large = Path(work_dir), name == 'vit-l14-336'
    model = build(Path(repo), large)
    torch.save(
        dict(model=model.state_dict(), iteration=119999),
        folder / 'theirs.pth')
    found: Dict[str, Tensor] = {}
    model.sem_seg_head.register_forward_hook(
        lambda module, args, out: found.update(
            masks=out['pred_masks'][-1], A=out['mask_embeds'][-1]))
    model.clip_rec_head.register_forward_hook(
        lambda module, args, out: found.update(B=out[0], dense=out[1]))
    overlap = model.dataset_overlap_maps[NEW]
    width = 768 if large else 512
    for i, (path, short) in enumerate(
            json.loads((folder / 'images.json').read_text())):
        image = Image.open(path).convert('RGB')
        size = image.size
        factor = short / min(size)
        small = tuple(int(s * factor + .5) for s in size)
        if small != size:
            image = image.resize(small, Image.BILINEAR)
        pixels = np.array(image, np.float32).transpose(2, 0, 1).copy()
        predictions: Dict[str, Tensor] = {}
        text = {
            SEEN: F.normalize(torch.randn(171, width), dim=1),
            NEW: F.normalize(torch.randn(150, width), dim=1)
        }
        for name in (None, SEEN, NEW):
            model.ov_classifier.cache.update(text)
            predictions[name or SEEN] = model([
                dict(
                    image=torch.from_numpy(pixels),
                    height=size[1],
                    width=size[0],
                    meta=dict(dataset_name=name or SEEN))
            ])[0]['sem_seg']
            if name is None:  # only to see what is there
                text = {
                    SEEN: vectors(found, 171, 1),
                    NEW: vectors(found, 150, 2)
                }
        torch.save(
            dict(
                path=path,
                short=short,
                seen=predictions[SEEN],
                new=predictions[NEW],
                seen_text=text[SEEN],
                new_text=text[NEW],
                overlap=overlap,
                found={
                    k: v.clone()
                    for k, v in found.items()
                }), folder / f'theirs_{i}.pt')
        print(f'reference: image {i} {size}', file=sys.stderr, flush=True)
