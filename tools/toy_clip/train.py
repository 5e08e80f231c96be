# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Train ToyCLIP, a tiny open_clip model that knows ToyScenes only.

Everything comes from the seed: crops and captions of generated scenes, a
byte-pair vocabulary of the captions, then contrastive training. A few minutes
on one CPU core.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List, Tuple

DEFAULT_OUT = (
    Path(__file__).resolve().parents[2] / 'mmseg_textkd' / 'clip' / 'toy_clip')


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        '--out', type=Path, default=DEFAULT_OUT, help='folder to write')
    parser.add_argument('--seed', type=int, default=0, help='of everything')
    parser.add_argument(
        '--scenes', type=int, default=1500, help='to crop from')
    parser.add_argument(
        '--steps', type=int, default=1500, help='of the first part')
    parser.add_argument(
        '--batch-size', type=int, default=180, help='crops in a step')
    parser.add_argument(
        '--vocab-size', type=int, default=1024, help='of the tokenizer')
    parser.add_argument(
        '--region-steps',
        type=int,
        default=800,
        help='steps of the second part, on windows of scenes')
    parser.add_argument('--windows', type=int, default=8, help='in a step')
    parser.add_argument(
        '--start',
        type=Path,
        help='folder of weights of the first part, which is left out')
    return parser.parse_args()


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import numpy as np
import torch
from bpe import NUM_FIXED, pack_merges, train_merges
from corpus import (CROP_SIZE, HYPERNYMS, LIGHT_WORDS, NOUNS, TEMPLATES,
                    WHOLE_SCENE, Crop, make_caption, make_crops)
from measure import MEAN, STD, evaluate, to_tensor
from regions import evaluate_regions, make_windows, train_regions

CARD = Path(__file__).with_name('model_card.md.in')


def model_config(vocab_size: int) -> Dict:
    """The content of ``open_clip_config.json``."""
    return dict(
        model_cfg=dict(
            embed_dim=64,
            vision_cfg=dict(
                image_size=CROP_SIZE,
                patch_size=8,
                width=64,
                layers=3,
                head_width=16),
            text_cfg=dict(
                context_length=32,
                vocab_size=vocab_size,
                width=64,
                heads=4,
                layers=2)),
        preprocess_cfg=dict(
            mean=list(MEAN),
            std=list(STD),
            interpolation='bicubic',
            resize_mode='squash'))


def build_vocabulary(crops: List[Crop], size: int,
                     rng: np.random.Generator) -> Tuple[bytes, int]:
    """Merges learned from captions; file content and vocabulary size."""
    texts = [
        make_caption(crops[rng.integers(len(crops))], rng) for _ in range(8000)
    ]
    # Every word at least some times, or it would be spelt in letters.
    rest = [t.format('') for t in TEMPLATES]
    for table in (NOUNS, HYPERNYMS, LIGHT_WORDS):
        rest += [word for words in table.values() for word in words]
    merges = train_merges(texts + rest * 20, size - NUM_FIXED)
    return pack_merges(merges), len(merges) + NUM_FIXED


def make_crop_loss(model, tokenizer, crops: List[Crop],
                   batch: int) -> Callable:
    """The contrastive loss of crops; every class is drawn equally often."""
    from open_clip import ClipLoss
    images = to_tensor(crops)
    labels = np.asarray([c.label for c in crops])
    groups = [np.flatnonzero(labels == k) for k in range(WHOLE_SCENE + 1)]
    loss_fn = ClipLoss()

    def crop_loss(rng: np.random.Generator) -> torch.Tensor:
        chosen = np.concatenate(
            [rng.choice(g, batch // len(groups)) for g in groups])
        x = images[chosen]
        flip = torch.from_numpy(rng.random(len(chosen)) < .5)
        x[flip] = x[flip].flip(-1)
        gain = torch.from_numpy(rng.normal(1, .08, (len(chosen), 1, 1, 1)))
        text = tokenizer([make_caption(crops[i], rng) for i in chosen])
        return loss_fn(
            model.encode_image(x * gain.float(), normalize=True),
            model.encode_text(text, normalize=True), model.logit_scale.exp())

    return crop_loss


def train(model, tokenizer, crops: List[Crop], steps: int, batch: int,
          seed: int) -> None:
    """Contrastive training on crops and captions."""
    rng = np.random.default_rng([seed, 1])
    crop_loss = make_crop_loss(model, tokenizer, crops, batch)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([
        dict(params=decay, weight_decay=.1),
        dict(params=plain, weight_decay=0.)
    ],
                                  lr=1.5e-3,
                                  betas=(.9, .98))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.5e-3, steps, pct_start=.1)
    model.train()
    start = time.time()
    for step in range(steps):
        loss = crop_loss(rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(50.))
        if (step + 1) % 100 == 0:
            print(
                f'step {step + 1}/{steps}: loss {loss.item():.3f}, '
                f'scale {model.logit_scale.exp().item():.1f}, '
                f'{time.time() - start:.0f} s',
                flush=True)


def main() -> None:
    """Generate and write, all or nothing."""
    args = parse_args()
    # One thread and fixed seeds: the same machine makes the same weights.
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        build(args, Path(folder))
        for path in Path(folder).iterdir():
            path.chmod(0o644)
            os.replace(path, args.out / path.name)
    print(f'wrote {args.out} in {time.time() - start:.0f} s')


def build(args: argparse.Namespace, folder: Path) -> None:
    """Make crops, vocabulary and weights; measure; write into a folder."""
    import open_clip
    from safetensors.torch import save_file
    crops = make_crops(args.seed, 'toy_clip_train', args.scenes)
    held_out = make_crops(args.seed, 'toy_clip_val', 200)
    print(f'{len(crops)} crops to train on, {len(held_out)} held out')
    merges, vocab_size = build_vocabulary(crops, args.vocab_size,
                                          np.random.default_rng(args.seed))
    config, bpe_path = model_config(vocab_size), folder / 'bpe_vocab.txt.gz'
    bpe_path.write_bytes(merges)
    (folder /
     'open_clip_config.json').write_text(json.dumps(config, indent=2) + '\n')
    name = f'local-dir:{folder}'
    # No weights are there yet: open_clip warns and starts from chance.
    model = open_clip.create_model(name, load_weights=False)
    tokenizer = open_clip.get_tokenizer(name, bpe_path=str(bpe_path))
    assert tokenizer.vocab_size == vocab_size
    if args.start is None:
        train(model, tokenizer, crops, args.steps, args.batch_size, args.seed)
    else:
        # Of the same captions, or its tokens would mean other words.
        assert (args.start / bpe_path.name).read_bytes() == merges
        open_clip.load_checkpoint(
            model, str(args.start / 'open_clip_model.safetensors'))
    crop_loss = make_crop_loss(model, tokenizer, crops, args.batch_size)
    windows = make_windows(args.seed, 'toy_clip_train', args.scenes)
    train_regions(model, tokenizer, windows, crop_loss, args.region_steps,
                  args.windows, args.seed)
    figures = evaluate(model, tokenizer, held_out, args.seed)
    windows = make_windows(args.seed, 'toy_clip_val', 200)
    figures.update(evaluate_regions(model, tokenizer, windows))
    print(json.dumps(figures, indent=2))
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(
        state,
        str(folder / 'open_clip_model.safetensors'),
        metadata=dict(format='pt'))
    card = CARD.read_text(encoding='utf-8').format(
        **figures,
        **vars(args),
        crops=len(crops),
        held_out=len(held_out),
        num_tokens=vocab_size,
        patch=config['model_cfg']['vision_cfg']['patch_size'],
        parameters=sum(p.numel() for p in model.parameters()),
        torch=torch.__version__.split('+')[0],
        open_clip=open_clip.__version__)
    (folder / 'README.md').write_text(card, encoding='utf-8')


if __name__ == '__main__':
    sys.exit(main())
