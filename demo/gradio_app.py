# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""A page in the browser: upload an image, write classes, see them.

It needs gradio (`pip install -r requirements/web.txt`) and is served to this
machine alone.
"""
import argparse
import html
import os
import sys
from typing import Any, NamedTuple, Optional, Sequence, Tuple


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the network')
    parser.add_argument('checkpoint', help='its weights')
    parser.add_argument(
        '--port',
        type=int,
        default=7860,
        help='of the page on this machine (default: %(default)s)')
    parser.add_argument(
        '--device', help='such as cpu or cuda:1 (default: a GPU, or the CPU)')
    parser.add_argument(
        '--max-pixels',
        type=int,
        default=89_478_485,
        help='larger images are refused before they are read (default: '
        '%(default)s)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import cv2
import numpy as np
from PIL import Image

from mmseg_textkd.apis import TextSegInferencer
from mmseg_textkd.apis.drawing import draw_labels

PAGE = """# Segment by words

Network: **{model}**. It tells the classes of its training apart; another
word gets what is nearest to it in what the network has learned, which may be
wrong.
"""
LEGEND = '<div style="display: flex; flex-wrap: wrap; gap: 4px 20px">{}</div>'
ENTRY = ('<span style="overflow-wrap: anywhere"><span style="display: '
         'inline-block; width: 1.4em; height: 1em; margin-right: .4em; '
         'border: 1px solid gray; vertical-align: -.1em; background: '
         'rgb({},{},{})"></span>{} <span style="opacity: .6">{}</span></span>')


class Segmented(NamedTuple):
    """What was found in a image.

    Attributes:
        image (np.ndarray): uint8, RGB, shape (H, W, 3).
        labels (np.ndarray): Class numbers, shape (H, W).
        classes (Sequence[str]): Names of the classes.
        palette (Sequence[Sequence[int]]): Their colors, RGB.
    """
    picture: np.ndarray
    labels: np.ndarray
    classes: Sequence[str]
    palette: Sequence[Sequence[int]]


def segment(inferencer: TextSegInferencer, picture: Optional[np.ndarray],
            words: str, other: bool) -> Segmented:
    """Segment one image.

    Args:
        inferencer (TextSegInferencer): The network.
        image (np.ndarray, optional): uint8, RGB, shape (H, W, 3).
        words (str): Names of classes with commas between them; nothing for
            the trained ones.
        other (bool): Whether a class 'other' is added.

    Returns:
        Segmented: What was found.

    Raises:
        ValueError: If there is no image, or the classes cannot be had.
    """
    if picture is None:
        raise ValueError('Upload an image first.')
    names = list(inferencer.own_meta['classes'])
    if words.strip():
        names = [word.strip() for word in words.split(',')]
        if '' in names:
            raise ValueError(
                f'Class {names.index("") + 1} has no name: there is nothing '
                'before, between or after two commas. Write a name there, or '
                'take the comma out.')
    inferencer.set_classes(names, other='other' if other else None)
    found = inferencer(picture[..., ::-1])
    meta = inferencer.model.dataset_meta
    return Segmented(picture, found['predictions'], meta['classes'],
                     meta['palette'])


def draw(found: Optional[Segmented], opacity: float) -> Optional[np.ndarray]:
    """Blend the image with its classes; nothing if there is none."""
    if found is None:
        return None
    return draw_labels(*found, opacity=opacity, legend=False)


def legend(found: Segmented) -> str:
    """List the classes that are seen, the largest first, as HTML."""
    counts = np.bincount(found.labels.ravel(), minlength=len(found.classes))
    entries = []
    for k in np.argsort(-counts, kind='stable'):
        share = 100 * counts[k] / counts.sum()
        if share:
            percent = f'{share:.1f} %' if share >= .1 else 'below 0.1 %'
            entries.append(
                ENTRY.format(*found.palette[k], html.escape(found.classes[k]),
                             percent))
    return LEGEND.format(''.join(entries))


def build_page(inferencer: TextSegInferencer, model: str = '') -> Any:
    """Make the page.

    Args:
        inferencer (TextSegInferencer): The network.
        model (str): Its name. Defaults to ''.

    Returns:
        gradio.Blocks: The page.
    """
    import gradio

    def read(payload: Any) -> Any:
        # Outside of `answer`, where an error would have no words.
        try:
            return gradio.Image.preprocess(picture, payload)
        except (OSError, SyntaxError, ValueError,
                Image.DecompressionBombError) as error:
            raise told(f'The image cannot be read: {error}') from error

    def told(text: str) -> gradio.Error:
        # It is shown as HTML, and goes away.
        return gradio.Error(
            html.escape(text, quote=False), duration=10, print_exception=False)

    def answer(picture: Optional[np.ndarray], words: str, other: bool,
               opacity: float) -> Tuple[Any, ...]:
        try:
            found = segment(inferencer, picture, words, other)
        except (OSError, RuntimeError, ValueError, cv2.error) as error:
            raise told(str(error)) from error
        return draw(found, opacity), legend(found), inferencer.source, found

    with gradio.Blocks(title='mmseg_textkd', analytics_enabled=False) as page:
        gradio.Markdown(PAGE.format(model=html.escape(model, quote=False)))
        found = gradio.State()
        with gradio.Row():
            with gradio.Column():
                picture = gradio.Image(
                    type='numpy', label='Image', buttons=['fullscreen'])
                # No subclass: gradio would write a file beside this one.
                picture.preprocess = read
                words = gradio.Textbox(
                    label='Classes, with commas between them',
                    placeholder=', '.join(inferencer.own_meta['classes']))
                gradio.Examples([['road, tree, bus stop'],
                                 ['sky, building, everything on wheels']],
                                words,
                                label='For example')
                other = gradio.Checkbox(label='and everything else: other')
                button = gradio.Button('Segment', variant='primary')
            with gradio.Column():
                shown = gradio.Image(
                    label='Result',
                    elem_id='result',
                    format='png',
                    interactive=False,
                    buttons=['download', 'fullscreen'])
                opacity = gradio.Slider(0, 1, .5, label='Opacity')
                seen = gradio.HTML(container=True, elem_id='legend')
                source = gradio.Textbox(label='Where the classes come from')
        # One at a time: the classes belong to the network that all share.
        gradio.on(
            triggers=[button.click, words.submit],
            fn=answer,
            inputs=[picture, words, other, opacity],
            outputs=[shown, seen, source, found],
            api_name='segment',
            show_progress_on=shown,
            concurrency_limit=1)
        # No work for the network.
        opacity.input(
            fn=draw,
            inputs=[found, opacity],
            outputs=shown,
            trigger_mode='always_last',
            show_progress='hidden',
            api_visibility='private')
    return page


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Serve the page."""
    args = parse_args(argv)
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
    # gradio reads what is uploaded by Pillow, which refuses twice of this.
    Image.MAX_IMAGE_PIXELS = args.max_pixels // 2
    try:
        inferencer = TextSegInferencer(
            args.config, args.checkpoint, device=args.device)
        inferencer.show_progress = False
        name = os.path.splitext(os.path.basename(args.config))[0]
        page = build_page(inferencer, name)
    except ImportError as error:
        sys.exit(f'Error: {error}. The page needs `pip install -r '
                 'requirements/web.txt`.')
    except (OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
    # Also errors of what gradio does itself, as to read an upload.
    page.launch(
        server_name='127.0.0.1',
        server_port=args.port,
        share=False,
        show_error=True)


if __name__ == '__main__':
    main()
