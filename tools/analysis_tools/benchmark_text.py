# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Time the encoding of classes against open_clip's own builder.

Both encode the same phrases in the same templates with the same tower, in
turn, in one process, and their vectors are compared. The model is `toyclip`,
or an architecture of open_clip, whose text side has random weights unless
PRETRAINED is given: the time is that of a trained one.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence

from benchmark_options import add_options, parse_options


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--model',
        default='toyclip',
        help="'toyclip' (default) or what open_clip knows, e.g. ViT-B-32")
    parser.add_argument(
        '--pretrained', help='tag or file of weights (default: random)')
    parser.add_argument(
        '--classes',
        default='ade20k',
        help='a vocabulary: a data set such as camvid, or a .txt or .json '
        'file (default: ade20k)')
    parser.add_argument(
        '--num-classes',
        type=int,
        help='the first so many only (default: all)')
    parser.add_argument(
        '--vocabulary', dest='old_vocabulary', help=argparse.SUPPRESS)
    parser.add_argument(
        '--templates',
        default='imagenet',
        help='prompt templates (default: imagenet)')
    add_options(parser, runs=3, warmup=1)
    args = parse_options(parser, argv)
    args.old_classes = args.classes if args.classes.isdigit() else None
    if args.old_classes:
        args.num_classes, args.classes = int(args.classes), 'ade20k'
    args.classes = args.old_vocabulary or args.classes
    if args.num_classes is not None and args.num_classes < 2:
        parser.error('--num-classes must be at least 2')
    return args


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import torch
from torch import Tensor

from mmseg_textkd.analysis.benchmark import interleave, stopwatch, summarize
from mmseg_textkd.analysis.benchmark_report import (TIME_HEADER, time_cells,
                                                    write_results)
from mmseg_textkd.clip import TextTower
from mmseg_textkd.clip.weights import (CONFIG_NAME, TextTowerError,
                                       import_open_clip)
from mmseg_textkd.text import Vocabulary
from mmseg_textkd.text.encode_classes import encode_classes
from mmseg_textkd.text.templates import get_templates
from mmseg_textkd.utils.arguments import warn_renamed
from mmseg_textkd.utils.report import describe, environment, table

OURS, THEIRS = 'mmseg_textkd', 'open_clip'


def random_tower(architecture: str) -> TextTower:
    """Make a tower of an architecture of open_clip, with random weights.

    Args:
        architecture (str): Name, such as 'ViT-B-32'.

    Returns:
        TextTower: The tower. Its image side, which it drops, was tiny.

    Raises:
        TextTowerError: If open_clip does not know the architecture, or it
            takes its text side from elsewhere.
    """
    open_clip = import_open_clip()
    from safetensors.torch import save_file
    config = open_clip.get_model_config(architecture)
    if (config is None or 'multimodal_cfg' in config
            or 'hf_model_name' in config['text_cfg']):
        raise TextTowerError(
            f'{architecture!r} has no text side of open_clip that could be '
            'made with random weights; give PRETRAINED.')
    config['vision_cfg'] = dict(
        image_size=32, patch_size=16, layers=1, width=32, head_width=16)
    torch.manual_seed(0)
    kind = 'CustomTextCLIP' if config.pop('custom_text', False) else 'CLIP'
    clip = getattr(open_clip, kind)(**config)
    for param in clip.parameters():
        # open_clip's initial values make nearly the same vector of any text.
        param.data += 0.05 * torch.randn_like(param)
    if kind != 'CLIP':
        config['custom_text'] = True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG_NAME
        path.write_text(json.dumps(dict(model_cfg=config, preprocess_cfg={})))
        save_file({
            k: v.contiguous()
            for k, v in clip.state_dict().items()
        }, path.with_name('open_clip_model.safetensors'))
        del clip
        return TextTower(f'local-dir:{folder}')


def measure(tower: TextTower, phrases: Mapping[str,
                                               str], templates: Sequence[str],
            runs: int, warmup: int) -> Dict[str, Any]:
    """Encode classes in both ways.

    Args:
        tower (TextTower): The tower of both.
        phrases (Mapping[str, str]): Phrase by name of the class.
        templates (Sequence[str]): Sentences with one ``{}``.
        runs (int): Number of rounds.
        warmup (int): Number of rounds before.

    Returns:
        dict[str, Any]: Times as of :func:`summarize`; ``max_difference`` of
        two vectors' entries, and for comparison ``closest_classes``, the
        smallest that two classes have.
    """
    vectors: Dict[str, Tensor] = {}

    def ours() -> None:
        vectors[OURS] = encode_classes(phrases, tower, templates).vectors

    def theirs() -> None:
        vectors[THEIRS] = import_open_clip().build_zero_shot_classifier(
            tower.clip,
            tower.tokenizer,
            list(phrases.values()),
            list(templates),
            device=tower.device).T.cpu()

    seconds = interleave(
        {
            OURS: stopwatch(ours, tower.device),
            THEIRS: stopwatch(theirs, tower.device)
        }, runs, warmup)
    distances = torch.cdist(vectors[OURS], vectors[OURS], p=float('inf'))
    distances.fill_diagonal_(float('inf'))
    return dict(
        times=summarize(seconds, OURS),
        max_difference=(vectors[OURS] - vectors[THEIRS]).abs().max().item(),
        closest_classes=distances.min().item())


def page(results: Mapping[str, Any]) -> str:
    """Write the results as Markdown."""
    rows = [(name, *time_cells(row)) for name, row in results['times'].items()]
    return (
        f'`{results["model"]}` ({results["params"] / 1e6:.1f} M parameters), '
        f'{results["classes"]} classes x {results["templates"]} templates; '
        f'{results["runs"]} rounds after {results["warmup"]}; '
        f'{describe(results["environment"])}\n\n'
        f'{table(("builder", *TIME_HEADER), rows)}\n\n'
        f'Largest difference of two entries {results["max_difference"]:.1e}; '
        'two classes differ by at least '
        f'{results["closest_classes"]:.1e}.\n')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    warn_renamed(
        args,
        vocabulary='--classes',
        json='--out',
        markdown='--out',
        classes='--num-classes for a number')
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        where = environment(import_open_clip())
        templates = get_templates(args.templates)
        vocabulary = Vocabulary.from_spec(args.classes)
        if args.model == 'toyclip' or args.pretrained:
            tower = TextTower(args.model, args.pretrained)
        else:
            tower = random_tower(args.model)
    except (FileNotFoundError, TextTowerError, ValueError) as error:
        sys.exit(f'Error: {error}')
    # open_clip's builder takes one phrase a class.
    phrases = {
        name: words[0]
        for name, words in zip(vocabulary.names, vocabulary.phrases)
    }
    phrases = dict(list(phrases.items())[:args.num_classes])
    results = dict(
        model=args.model,
        pretrained=args.pretrained,
        params=sum(p.numel() for p in tower.parameters()),
        classes=len(phrases),
        templates=len(templates),
        runs=args.runs,
        warmup=args.warmup,
        environment=where,
        **measure(tower, phrases, templates, args.runs, args.warmup))
    write_results(results, page(results), args.out)


if __name__ == '__main__':
    main()
