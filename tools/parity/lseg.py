# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Compare LSeg with the code of its authors.

REPO is a clone of https://github.com/isl-org/lang-seg (compared: bb00b21). Its
network is built with random weights in all layers and in CLIP ViT-B/32, saved
in Lightning's format, converted by lseg2mmseg.py, and asked for the same
images as ours. Replaced are only what fetches weights, and `clip.tokenize` by
that of open_clip. Prints one row of a table in Markdown: images, largest
difference of logits, the same relative to the largest logit, and how many
pixels have the same class: of all, and of those where their two largest logits
are more than two steps of half precision apart.
"""
import argparse
import copy
import runpy
import sys
import types
import warnings
from pathlib import Path
from typing import Any, List, Optional, Sequence

ROOT = Path(__file__).resolve().parents[2]
CLIP = 'ViT-B-32-quickgelu'
# Their class and name of the network, their words, our config.
NETWORKS = {
    'vit-l16': ('lseg_net.LSegNet', 'clip_vitl16_384', 'ade20k_objectInfo150',
                'lseg_dpt_vit-l16_vit-b32_6xb1-808k_ade20k-480x480'),
    'vit-b32': ('lseg_net.LSegNet', 'clip_vitb32_384', 'ade20k_objectInfo150',
                'lseg_dpt_vit-b32_vit-b32_6xb1-808k_ade20k-480x480'),
    'r101': ('lseg_net_zs.LSegRNNetZS', 'clip_resnet101', 'fewshot_pascal',
             'lseg_dpt_r101_vit-b32_pascal-5i-episodes-480x480'),
    'zs-vit-l16':
    ('lseg_net_zs.LSegNetZS', 'clip_vitl16_384', 'fewshot_pascal',
     'lseg_dpt_vit-l16_vit-b32_pascal-5i-episodes-480x480')
}


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('repo', type=Path, help='clone of lang-seg')
    parser.add_argument('network', choices=NETWORKS, help='which of theirs')
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs/parity_lseg'),
        help='folder of the checkpoints, up to 4 GB (default: %(default)s)')
    parser.add_argument(
        '--images',
        type=Path,
        nargs='*',
        default=[],
        help='images (default: random ones, noise and smooth ones in turn)')
    parser.add_argument(
        '--num-images',
        type=int,
        default=10,
        help='random images (default: %(default)s)')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        default=(480, 480),
        help='of the images (default: %(default)s)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

# isort: split
import mmcv
import open_clip
import timm
import torch
import torch.nn.functional as F
import torchvision
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmseg_textkd.utils.checkpoint import load_strictly, read_checkpoint


def fake_clip() -> types.ModuleType:
    """Make what the reference imports as `clip`."""
    module: Any = types.ModuleType('clip')
    module.tokenize = lambda text: open_clip.get_tokenizer(
        CLIP)([text] if isinstance(text, str) else text)

    def load(name: str, device: str = 'cpu', jit: bool = False):
        assert name == 'ViT-B/32', name
        model = open_clip.create_model(CLIP, pretrained=None)
        for param in model.parameters():
            param.data += 0.01 * torch.randn_like(param)
        # As `clip.load` gives it on a GPU. CPUs are slow in half precision:
        # weights and results are rounded to it, products are not.
        model.half()
        exact = copy.deepcopy(model).float()
        model.encode_text = lambda ids: exact.encode_text(ids).half()
        return model, None

    module.load = load
    return module


def build_reference(repo: Path, name: str, labels: List[str]) -> nn.Module:
    """Build their network with random weights in all layers."""
    sys.path.insert(0, str(repo))
    sys.modules['clip'] = fake_clip()
    sys.modules.setdefault('pandas', types.ModuleType('pandas'))
    create, resnet101 = timm.create_model, torchvision.models.resnet101
    timm.create_model = lambda name, pretrained: create(name)
    torchvision.models.resnet101 = lambda pretrained: resnet101()
    torch.manual_seed(0)
    where, backbone = NETWORKS[name][:2]
    file, cls = where.split('.')
    module = __import__(f'modules.models.{file}', fromlist=[cls])
    if cls == 'LSegNet':
        net = module.LSegNet(
            labels=labels,
            backbone=backbone,
            features=256,
            crop_size=480,
            arch_option=0,
            block_depth=0,
            activation='lrelu')
    else:
        net = getattr(module, cls)(
            label_list=labels,
            backbone=backbone,
            features=256,
            aux=False,
            use_pretrained=False,
            arch_option=0,
            block_depth=0,
            activation='relu')
    # Wider than initial weights, whose features hardly differ in a image.
    for key, layer in net.named_modules():
        if 'clip_pretrained' in key:
            continue
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            fan = len(layer.weight) if isinstance(
                layer, nn.ConvTranspose2d) else layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=1.4 / fan**.5)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=.1)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, std=.1)
            nn.init.uniform_(layer.running_var, .5, 1.5)
            nn.init.uniform_(layer.weight, .5, 1.5)
            nn.init.normal_(layer.bias, std=.1)
    for key, param in net.named_parameters():
        if key.endswith(('pos_embed', 'cls_token')):
            nn.init.normal_(param, std=.5)
    return net.eval()


def convert(net: nn.Module, config: Path, folder: Path) -> Path:
    """Save their network as Lightning does and convert it."""
    theirs, ours = folder / 'theirs.ckpt', folder / 'ours.pth'
    torch.save(
        dict(
            epoch=200,
            global_step=1,
            state_dict={
                f'net.{k}': v
                for k, v in net.state_dict().items()
            }), theirs)
    ours.unlink(missing_ok=True)
    tool = runpy.run_path(str(ROOT / 'tools/model_converters/lseg2mmseg.py'))
    tool['main']([str(config), str(theirs), '--out', str(ours)])
    return ours


def build_ours(config: Path, checkpoint: Path) -> nn.Module:
    """Build our network with the converted weights."""
    cfg = Config.fromfile(config)
    init_default_scope('mmseg')
    cfg.model.backbone.pop('init_cfg', None)
    # One process; whole images.
    cfg.model.decode_head.norm_cfg.type = 'BN'
    if 'ResNet' in cfg.model.backbone.type:
        cfg.model.backbone.norm_cfg.type = 'BN'
    cfg.model.data_preprocessor.test_cfg = None
    cfg.model.test_cfg = dict(mode='whole')
    model = MODELS.build(cfg.model).eval()
    load_strictly(model, read_checkpoint(checkpoint)['state_dict'], checkpoint)
    return model


def load_images(args: argparse.Namespace) -> List[Tensor]:
    """BGR, float, with shape (3, H, W)."""
    size = tuple(args.size)
    found = [
        torch.from_numpy(mmcv.imresize(mmcv.imread(str(path)),
                                       size[::-1])).permute(2, 0, 1).float()
        for path in args.images
    ]
    torch.manual_seed(5)
    for i in range(0 if found else args.num_images):
        noise = torch.randint(0, 256, (3, *size)).float()
        smooth = F.interpolate(
            torch.rand(1, 3, 8, 8) * 255, size, mode='bicubic')[0]
        found.append(smooth.clamp(0, 255).round() if i % 2 else noise)
    return found


@torch.no_grad()
def compare(args: argparse.Namespace) -> str:
    """Do what the command line says and return the row."""
    *_, words, config = NETWORKS[args.network]
    path = ROOT / 'configs/lseg' / f'{config}.py'
    lines = (args.repo / 'label_files' /
             f'{words}.txt').read_text().split('\n')
    labels = [line.strip() for line in lines if line.strip()]
    episodes = args.network in ('r101', 'zs-vit-l16')
    if not episodes:
        labels = [n.split(',')[-1].split(';')[0] for n in labels][1:]
    args.work_dir.mkdir(parents=True, exist_ok=True)
    net = build_reference(args.repo, args.network, labels)
    model = build_ours(path, convert(net, path, args.work_dir))
    mean = model.data_preprocessor.mean.view(3, 1, 1)
    std = model.data_preprocessor.std.view(3, 1, 1)
    worst = relative = same = total = same_clear = clear = 0.
    for i, image in enumerate(load_images(args)):
        rgb = ((image.flip(0) - mean) / std)[None]
        theirs = net(rgb, [i % 20]) if episodes else net(rgb)
        shape = image.shape[1:]
        sample = SegDataSample(
            metainfo=dict(
                img_shape=shape,
                ori_shape=shape,
                pad_shape=shape,
                class_id=i % 20))
        data = model.data_preprocessor(
            dict(inputs=[image.byte()], data_samples=[sample]), False)
        result = model(**data, mode='predict')[0]
        ours = result.seg_logits.data[None]
        difference = (theirs - ours).abs().max().item()
        largest = theirs.abs().max()
        worst = max(worst, difference)
        relative = max(relative, difference / largest.item())
        equal = theirs.argmax(1) == result.pred_sem_seg.data
        same, total = same + equal.sum().item(), total + equal.numel()
        step = torch.finfo(torch.half).eps * 2**largest.log2().floor()
        best = theirs.topk(2, dim=1).values
        apart = best[:, 0] - best[:, 1] > 2 * step
        same_clear += (equal & apart).sum().item()
        clear += apart.sum().item()
        print(
            f'{i}: {difference:.3g}, {100 * equal.float().mean():.4f} % same, '
            f'{len(theirs.argmax(1).unique())} classes',
            file=sys.stderr)
    what = 'images' if args.images else 'random images'
    size = 'x'.join(map(str, args.size))
    return (f'| {args.network} | {i + 1} {what} of {size} | {worst:.3g} | '
            f'{100 * relative:.2g} % | {100 * same / total:.3f} % | '
            f'{100 * same_clear / clear:.3f} % of {100 * clear / total:.1f} % '
            '|')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    warnings.simplefilter('ignore')
    print(compare(parse_args(argv)))


if __name__ == '__main__':
    main()
