# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""demo/gradio_app.py in a headless browser, as somebody uses it.

It needs gradio, Playwright and a Chromium: ``bash tools/test_page.sh``.
"""
import base64
import os
import re
import shutil
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import cv2
import numpy as np
import pytest
from mmengine.registry import DefaultScope
from processes import ROOT, free_port
from text_runs import RUNS, make
from tiny import CLASSES

from mmseg_textkd.apis import TextSegInferencer

pytest.importorskip('gradio', reason='gradio is not installed')
playwright = pytest.importorskip(
    'playwright.sync_api', reason='playwright is not installed')
expect = playwright.expect
expect.set_options(timeout=30_000)

# In containers there is neither a sandbox nor a GPU; and no calls home.
SWITCHES = '''--no-sandbox --disable-gpu --disable-background-networking
--disable-component-update --disable-sync --no-first-run'''.split()
# The first two, which a browser or a template may take for code, are seen.
WORDS = ('<b>tree</b>', '${1+1}{{x}}', '道路')
# Chromium's own drawing of the image, pixel by pixel, once it is loaded. In
# one call: between two, the page may begin to load the next image.
PIXELS = '''async image => {
    await image.decode();
    const canvas = document.createElement('canvas');
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    canvas.getContext('2d').drawImage(image, 0, 0);
    return [image.getAttribute('src'), canvas.toDataURL('image/png')];
}'''


@pytest.fixture(scope='module')
def browser():
    """Chromium of the system, or else Playwright's own."""
    names = 'chromium', 'chromium-browser', 'google-chrome'
    found = [*filter(None, map(shutil.which, names)), None]
    system = os.environ.get('CHROMIUM') or found[0]
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(
                executable_path=system, args=SWITCHES)
        except playwright.Error as error:
            reason = str(error).strip().splitlines()[0]
            pytest.skip(f'no Chromium that starts ({system}): {reason}')
        yield browser
        browser.close()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A tiny text network with ToyCLIP."""
    with DefaultScope.overwrite_default_scope('mmseg'):
        return make(tmp_path_factory.mktemp('page'), *RUNS['residual'])


@pytest.fixture(scope='module')
def served(browser, run, tmp_path_factory):
    """Address of the page, served by the command of the guide."""
    port, folder = free_port(), tmp_path_factory.mktemp('server')
    cache = str(folder / 'cache')
    env = dict(PYTHONPATH=ROOT, HF_HUB_OFFLINE='1', MMSEG_TEXTKD_CACHE=cache)
    words = (sys.executable, f'{ROOT}/demo/gradio_app.py', run.config,
             run.weights, '--port', port, '--device', 'cpu')
    with open(folder / 'log', 'w') as log:
        options = dict(cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        server = subprocess.Popen(words, env=os.environ | env, **options)
    url, end = f'http://127.0.0.1:{port}', time.monotonic() + 120
    try:
        while True:
            try:
                urlopen(url, timeout=5).close()
                break
            except URLError:
                said = (folder / 'log').read_text()
                assert server.poll() is None and time.monotonic() < end, said
                time.sleep(.2)
        yield url
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def page(browser, served):
    """The page, just opened; it must ask nobody else for anything."""
    page = browser.new_page(viewport=dict(width=1280, height=800))
    page.set_default_timeout(30_000)
    asked = []
    page.on('request', lambda request: asked.append(request.url))
    page.goto(served)
    expect(page.get_by_role('button', name='Segment')).to_be_visible()
    yield page
    page.close()
    own = (served, 'data:', 'blob:')
    assert asked and [url for url in asked if not url.startswith(own)] == []


@pytest.fixture
def inferencer(run, tmp_path, monkeypatch):
    """What the page should show comes from here."""
    monkeypatch.setenv('MMSEG_TEXTKD_CACHE', str(tmp_path))
    made = TextSegInferencer(run.config, run.weights, device='cpu')
    made.show_progress = False
    return made


def ask(page, words, picture=None):
    """Upload an image, write classes, press the button."""
    if picture is not None:
        page.locator('input[type=file]').first.set_input_files(picture)
        # The upload is over when the image can be taken away again.
        expect(page.get_by_label('Remove Image')).to_be_visible()
    page.get_by_label('Classes, with commas').fill(words)
    page.get_by_role('button', name='Segment').click()


def result(page, before=None):
    """Address and pixels of the result, once it is another than before."""
    image = page.locator('#result img')
    expect(image).to_be_visible()
    if before is not None:
        expect(image).not_to_have_attribute('src', before)
    src, pixels = image.evaluate(PIXELS)
    return src, decode(base64.b64decode(pixels.split(',')[1]))


def decode(data):
    """Pixels of an encoded image."""
    data = np.frombuffer(data, np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]


def slide(page, to):
    """Press the mouse on the slider there; returns where it is then."""
    slider = page.locator('input[type=range]')
    box = slider.bounding_box()
    page.mouse.click(box['x'] + to * box['width'],
                     box['y'] + box['height'] / 2)
    value = float(slider.input_value())
    assert abs(value - to) < .05
    return value


def test_from_a_picture_to_its_classes(page, run, inferencer):
    words = ', '.join(WORDS)
    inferencer.set_classes(list(WORDS), other='other')

    def drawn(opacity, image=run.images[0]):
        options = dict(return_vis=True, opacity=opacity, legend=False)
        return inferencer(image, **options)['visualization']

    first = slide(page, .2)
    page.get_by_label('and everything else').check()
    ask(page, words, run.images[0])
    src, pixels = result(page)
    assert np.array_equal(pixels, drawn(first))
    # What is saved is what is seen.
    assert np.array_equal(decode(page.request.get(src).body()), pixels)

    # The slider is enough for another opacity, from 0 to 1.
    second = slide(page, .8)
    src, other = result(page, src)
    assert np.array_equal(other, drawn(second))
    photo = cv2.imread(run.images[0])[..., ::-1].astype(int)
    far = [np.abs(shown - photo).mean() for shown in (pixels, other)]
    assert 0 < far[0] < far[1] / 2
    box = page.locator('input[type=number]')
    for opacity in (0, 1):
        box.fill(str(opacity))
        src, shown = result(page, src)
        assert np.array_equal(shown, drawn(opacity))
    # And it holds for the next image.
    page.get_by_label('Remove Image').click()
    ask(page, words, run.images[1])
    src, shown = result(page, src)
    assert np.array_equal(shown, drawn(1, run.images[1]))
    assert not np.array_equal(shown, drawn(1))


def check_legend(page, inferencer, words, image):
    """The legend will be that of the inferencer for ``words``."""
    inferencer.set_classes(words)
    found = inferencer(image)['predictions']
    shares = np.bincount(found.ravel(), minlength=len(words)) / found.size
    order = [k for k in np.argsort(-shares, kind='stable') if shares[k]]
    entries = page.locator('#legend span:has(> span)')
    expect(entries).to_have_count(len(order))
    palette = inferencer.model.dataset_meta['palette']
    for entry, k in zip(entries.all(), order):
        said = f'{100 * shares[k]:.1f} %' if shares[k] >= .001 else 'below'
        expect(entry).to_contain_text(f'{words[k]} {said}')
        color = entry.locator('span').first.evaluate(
            'e => getComputedStyle(e).backgroundColor')
        assert re.findall(r'\d+', color) == list(map(str, palette[k]))
    source = page.get_by_label('Where the classes come from')
    expect(source).to_have_value(inferencer.source)


def test_the_legend_names_what_is_seen(page, run, inferencer):
    # A class that is asked for alone is seen, whatever the network learned.
    image = run.images[0]
    for words in [WORDS[:1], WORDS[1:2], WORDS[2:], WORDS]:
        ask(page, ', '.join(words), image if words == WORDS[:1] else None)
        check_legend(page, inferencer, list(words), image)
    # Nothing written: the classes of the training, by the key Enter.
    page.get_by_label('Classes, with commas').fill('')
    page.get_by_label('Classes, with commas').press('Enter')
    check_legend(page, inferencer, list(CLASSES), image)
    assert inferencer.source == 'as trained'


# All messages: test_answers_of_the_page, test_bad_classes_change_nothing.
@pytest.mark.parametrize('words, message', [
    (' , ', 'Class 1 has no name'),
    ('<i>a</i>, <i>a</i>', "Class name '<i>a</i>' occurs twice"),
])
def test_bad_words_are_told(page, run, words, message):
    ask(page, words, run.images[0])
    told = page.get_by_text(message)
    expect(told).to_be_visible()
    expect(page.locator('#result img')).to_have_count(0)
    # It can be closed, and better words work.
    page.get_by_role('button', name='Close', exact=True).click()
    expect(told).to_have_count(0)
    ask(page, 'road, tree')
    assert result(page)[1].shape == (32, 64, 3)


def test_a_picture_is_needed_that_can_be_read(page, tmp_path):
    ask(page, 'road')
    expect(page.get_by_text('Upload an image first.')).to_be_visible()
    path = tmp_path / 'broken.png'
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(99))
    ask(page, 'road', str(path))
    expect(page.get_by_text('The image cannot be read')).to_be_visible()


@pytest.mark.parametrize('width', [1280, 360])
def test_many_and_long_names_fit(page, run, width):
    page.set_viewport_size(dict(width=width, height=800))
    words = [f'thing {i}' for i in range(18)]
    words += ['the long gray thing at the end of it', 'x' * 24]
    ask(page, ', '.join(words), run.images[0])
    result(page)
    seen = page.locator('#legend span:has(> span)')
    expect(seen.nth(1)).to_be_visible()
    # Nothing stands out to the right of the window or of its box.
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    legend = page.locator('#legend').bounding_box()
    for entry in seen.all():
        box = entry.bounding_box()
        assert box['x'] >= legend['x']
        assert box['x'] + box['width'] <= legend['x'] + legend['width'] + 1
