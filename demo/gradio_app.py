# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""A page in the browser: upload a picture, write classes, see them.

It needs gradio (`pip install gradio`) and is served to this machine alone.
"""
import argparse
import os
import sys
from typing import Any, Optional, Sequence, Tuple

import numpy as np

import mmseg_textkd  # noqa: F401  (before mmseg.apis)
from mmseg_textkd.apis import TextSegInferencer


def segment(inferencer: TextSegInferencer, picture: Optional[np.ndarray],
            words: str, other: bool, opacity: float) -> Tuple[Any, str]:
    """Segment one picture.

    Args:
        inferencer (TextSegInferencer): The network.
        picture (np.ndarray, optional): uint8, RGB, shape (H, W, 3).
        words (str): Names of classes with commas between them; nothing for
            the trained ones.
        other (bool): Whether a class 'other' is added.
        opacity (float): Weight of the colours.

    Returns:
        tuple[np.ndarray, str]: The picture with overlay and legend, and what
        is to be said of it.

    Raises:
        ValueError: If there is no picture, or the classes cannot be had.
    """
    if picture is None:
        raise ValueError('Upload a picture first.')
    names = [word.strip() for word in words.split(',')
             ] if words.strip() else (list(inferencer.own_meta['classes']))
    inferencer.set_classes(names, other='other' if other else None)
    found = inferencer(picture[..., ::-1], return_vis=True, opacity=opacity)
    labels, counts = np.unique(found['predictions'], return_counts=True)
    seen = ', '.join(f'{inferencer.classes[k]} {100 * n / counts.sum():.1f} %'
                     for n, k in sorted(zip(counts, labels), reverse=True))
    return found['visualization'], f'{seen}. Vectors: {inferencer.source}.'


def build_page(inferencer: TextSegInferencer) -> Any:
    """Make the page.

    Args:
        inferencer (TextSegInferencer): The network.

    Returns:
        gradio.Blocks: The page.
    """
    import gradio

    def answer(*values: Any) -> Tuple[Any, str]:
        try:
            return segment(inferencer, *values)
        except (RuntimeError, ValueError) as error:
            raise gradio.Error(str(error)) from error

    with gradio.Blocks(title='mmseg_textkd', analytics_enabled=False) as page:
        with gradio.Row():
            with gradio.Column():
                picture = gradio.Image(type='numpy', label='Picture')
                words = gradio.Textbox(
                    label='Classes, with commas between them',
                    placeholder=', '.join(inferencer.own_meta['classes']))
                other = gradio.Checkbox(label='and everything else: other')
                opacity = gradio.Slider(0, 1, .5, label='Opacity')
                button = gradio.Button('Segment')
            with gradio.Column():
                shown = gradio.Image(label='Classes', format='png')
                said = gradio.Textbox(label='What is seen')
        # One at a time: the classes belong to the network that all share.
        button.click(
            answer, [picture, words, other, opacity], [shown, said],
            api_name='segment',
            concurrency_limit=1)
    return page


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Serve the page."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the network')
    parser.add_argument('checkpoint', help='its weights')
    parser.add_argument('--port', type=int, default=7860)
    parser.add_argument('--device', help='default: a GPU if there is one')
    args = parser.parse_args(argv)
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
    try:
        inferencer = TextSegInferencer(
            args.config, args.checkpoint, device=args.device)
        inferencer.show_progress = False
        page = build_page(inferencer)
    except ImportError as error:
        sys.exit(f'Error: {error}. The page needs `pip install gradio`.')
    except (OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
    page.launch(server_name='127.0.0.1', server_port=args.port, share=False)


if __name__ == '__main__':
    main()
