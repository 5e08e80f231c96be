# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Videos: data sets, consistency, and the stream of the inferencer."""
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from each_case import each_case
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.apis import inference_model, init_model
from mmseg.registry import DATASETS, MODELS
from text_runs import RUNS, make
from tiny import (CLASSES, CONTROL, PIPELINE, save_weights, stir, tiny_config,
                  write_video)
from tool_modules import ROOT, load_tool

from mmseg_textkd.apis import TextSegInferencer, video
from mmseg_textkd.apis.video import (LogitSmoother, VideoError, read_frames,
                                     segment_video, stream_video)
from mmseg_textkd.datasets.toy_scenes_generator import generate_toy_videos
from mmseg_textkd.deploy.run import frame_rate
from mmseg_textkd.evaluation import VideoConsistencyMetric
from mmseg_textkd.study import Ledger


def sample(path, label, predicted):
    return dict(
        img_path=path,
        gt_sem_seg=dict(data=label[None]),
        pred_sem_seg=dict(data=predicted[None]))


def consistency(classes='ab', **options):
    metric = VideoConsistencyMetric(iou_metrics=['mIoU'], **options)
    metric.dataset_meta = dict(classes=tuple(classes))
    return metric


@each_case('correct', [True, False])
def test_consistency_against_windows_one_by_one(correct):
    metric = consistency('abc', windows=(2, 3), correct=correct)
    videos = []
    for name, length in (('v', 5), ('w', 4)):
        shape = length, 6, 8
        change, ignored, wrong = torch.rand(3, *shape)
        labels = torch.randint(3, shape[1:]).expand(shape)
        labels = labels.where(change > .2, torch.randint(3, shape))
        labels = labels.masked_fill(ignored < .1, 255)
        predicted = labels.masked_fill(wrong < .3, 2)
        predicted[predicted == 255] = 0
        videos.append((labels, predicted))
        for t, frames in enumerate(zip(labels, predicted)):
            metric.process({}, [sample(f'data/{name}/{t:03d}.png', *frames)])
    found = metric.evaluate(9)
    for window in (2, 3):
        shares = []
        for labels, predicted in videos:
            for a, b in zip(*(x.unfold(0, window, 1)
                              for x in (labels, predicted))):
                stays = (a == a[..., :1]).all(-1) & (a[..., 0] != 255)
                met = (b == (a if correct else b[..., :1])).all(-1)
                if stays.any():
                    shares.append(met[stays].float().mean().item())
        assert found[f'mVC_{window}'] == pytest.approx(
            100 * np.mean(shares), abs=.006)
    truth, predicted = (torch.cat(parts) for parts in zip(*videos))
    valid = truth != 255
    confusion, _, _ = np.histogram2d(truth[valid], predicted[valid], range(4))
    rows, columns = confusion.sum(1), confusion.sum(0)
    iou = confusion.diagonal() / (rows + columns - confusion.diagonal())
    weighted = np.average(iou, weights=rows)
    assert found['wIoU'] == pytest.approx(100 * weighted, abs=.006)


def test_frames_must_come_in_their_order():
    frame, wide = (torch.zeros(2, n, dtype=torch.long) for n in (2, 3))
    # The sequences of CamVid lie in one folder.
    camvid = dict(video=r'([^/]+)_[^/]+$')
    cases = [
        (['v/2.png', 'v/1.png'], {}, 'must come in their order'),
        (['v/1.png', 'w/1.png', 'v/2.png'], {}, 'do not shuffle'),
        (['v/0001TP_9.png', 'v/0006R0_1.png', 'v/0006R0_2.png'], camvid, None),
        (['v/1.png'], camvid, 'does not fit the `video` pattern'),
        (['v/1.png', 'v/2_wide.png'], {}, 'has the size'),
    ]
    for paths, options, message in cases:
        metric = consistency(**options)
        error = pytest.raises(ValueError, match=message)
        with error if message else nullcontext():
            for path in paths:
                labels = wide if 'wide' in path else frame
                metric.process({}, [sample(path, labels, labels)])


def test_toy_videos_move_and_are_labeled(tmp_path):
    root = tmp_path / 'videos'
    generate_toy_videos(root, 2, 6, height=64, width=96)
    cfg = dict(type='VideoFramesDataset', data_root=str(root))
    cfg.update(img_suffix='.png', metainfo=dict(classes=tuple('abcdefgh')))
    dataset = DATASETS.build(dict(cfg, pipeline=PIPELINE))
    assert len(dataset) == 12
    videos = [i['video'] for i in map(dataset.get_data_info, range(12))]
    assert videos == ['video00'] * 6 + ['video01'] * 6
    assert dataset[0]['inputs'].shape == (3, 64, 96)
    first, second, last = (
        dataset[i]['data_samples'].gt_sem_seg.data[0] for i in (0, 1, 5))
    assert first.shape == (64, 96) and len(first.unique()) > 3
    # A little from frame to frame, and more over the whole video.
    assert 0 < (first != second).sum() < (first != last).sum()
    with pytest.raises(FileExistsError, match='write elsewhere'):
        generate_toy_videos(root)


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    """With leading zeros or without, in the metric too."""
    names = [f'{i}' for i in (1, 2, 9, 10, 11)]
    for folder, suffix in (('origin', '.jpg'), ('mask', '.png')):
        (tmp_path / 'v' / folder).mkdir(parents=True)
        for name in names:
            cv2.imwrite(f'{tmp_path}/v/{folder}/{name}{suffix}',
                        np.zeros((4, 4), np.uint8))
    dataset = DATASETS.build(
        dict(
            type='VideoFramesDataset',
            data_root=str(tmp_path),
            metainfo=dict(classes='ab'),
            pipeline=[]))
    paths = [dataset.get_data_info(i)['img_path'] for i in range(5)]
    assert [Path(path).stem for path in paths] == names
    metric, label = consistency(), torch.zeros(4, 4, dtype=torch.long)
    for path in paths:
        metric.process({}, [sample(path, label, label)])
    with pytest.raises(ValueError, match='come in their order'):
        metric.process({}, [sample(paths[1], label, label)])


def test_vspw_in_its_layout(tmp_path):
    image = np.zeros((4, 6, 3), np.uint8)
    label = np.array([[0, 1, 124, 254, 255, 2]] * 4, np.uint8)
    for frame in ('a/{}/00000000', 'a/{}/00000001', 'b/{}/00000000',
                  'c/{}/00000000'):
        for folder, suffix, array in (('origin', '.jpg', image),
                                      ('mask', '.png', label)):
            path = tmp_path / 'data' / (frame.format(folder) + suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), array)
    (tmp_path / 'val.txt').write_text('b\na\n')
    cfg = dict(type='VSPWDataset', data_root=str(tmp_path), pipeline=PIPELINE)
    dataset = DATASETS.build(cfg)
    videos = [i['video'] for i in map(dataset.get_data_info, range(3))]
    assert videos == ['b', 'a', 'a']
    labels = dataset[0]['data_samples'].gt_sem_seg.data[0, 0].tolist()
    assert labels == [255, 0, 123, 255, 255, 1]
    classes = dataset.metainfo['classes']
    assert len(set(classes)) == 124
    assert (classes[0], classes[123]) == ('wall', 'train')
    (tmp_path / 'val.txt').write_text('nowhere\n')
    with pytest.raises(FileNotFoundError, match='nowhere has no'):
        DATASETS.build(cfg)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    with DefaultScope.overwrite_default_scope('mmseg'):
        return make(tmp_path_factory.mktemp('video'), *RUNS['fixed'])


@pytest.fixture(scope='module')
def inferencer(trained):
    with DefaultScope.overwrite_default_scope('mmseg'):
        mine = TextSegInferencer(trained.config, trained.weights, device='cpu')
    mine.show_progress = False
    return mine


def frames_of(number):
    """A scene that changes a little from frame to frame."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 230, (32, 64, 3))
    return [(first + rng.integers(0, 25, first.shape)).astype(np.uint8)
            for _ in range(number)]


@pytest.fixture
def four(tmp_path):
    """A video of four frames."""
    path = str(tmp_path / 'in.avi')
    write_video(path, frames_of(4), 25)
    return path


def test_stream_is_frame_by_frame(inferencer):
    frames = frames_of(7)
    found = list(stream_video(inferencer, frames, batch_size=3))
    assert [item.number for item in found] == list(range(7))
    for item, frame in zip(found, frames):
        assert np.array_equal(item.frame, frame)
        assert np.array_equal(item.labels, inferencer(frame)['predictions'])


def test_smoothing_is_an_average_from_cut_to_cut(inferencer):
    frames = [*frames_of(3), *(255 - frame for frame in frames_of(2))]
    found = list(stream_video(inferencer, frames, batch_size=2, smoothing=.7))
    average = None
    for number, (frame, item) in enumerate(zip(frames, found)):
        data = inferencer.collate_fn([inferencer.pipeline(frame)])
        batch = inferencer.model.data_preprocessor(data, False)
        out, = inferencer.model(**batch, mode='predict')
        logits = out.seg_logits.data
        cut = number in (0, 3)
        average = logits if cut else .7 * average + .3 * logits
        agree = average.argmax(0).numpy() == item.labels
        assert agree.mean() > .999
    plain = list(stream_video(inferencer, frames))
    assert any((a.labels != b.labels).any() for a, b in zip(plain, found))
    with pytest.raises(ValueError, match='between 0 and 1'):
        next(stream_video(inferencer, frames, smoothing=1.))


def of_one_logit(tmp_path):
    """Config of a network with one logit for two classes."""
    cfg = tiny_config(tmp_path, CONTROL)
    classes = dict(classes=('a', 'b'), palette=[[0] * 3, [9] * 3])
    cfg.test_dataloader.dataset.metainfo = classes
    cfg.val_dataloader.dataset.metainfo = classes
    cfg.model.decode_head.update(
        num_classes=2,
        out_channels=1,
        threshold=.4,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True))
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.dump(tmp_path / 'config.py')
    return Config.fromfile(tmp_path / 'config.py')


def test_one_logit_is_smoothed_too(tmp_path):
    """A threshold decides, as without."""
    cfg = of_one_logit(tmp_path)
    weights = save_weights(tmp_path / 'w.pth', stir(MODELS.build(cfg.model)),
                           ('a', 'b'))
    mine = TextSegInferencer(
        str(tmp_path / 'config.py'), weights, device='cpu')
    frames = frames_of(1) * 3
    data = mine.collate_fn([mine.pipeline(frames[0])])
    batch = mine.model.data_preprocessor(data, False)
    conv = mine.model.decode_head.conv_seg
    with torch.no_grad():  # about half of the pixels are above
        logits = mine.model(**batch, mode='tensor')
        conv.weight /= logits.std()
        conv.bias.copy_((conv.bias - logits.median()) / logits.std() - .4)
    plain, smooth = (
        np.stack([s.labels for s in stream_video(mine, frames, smoothing=w)])
        for w in (None, .5))
    assert .3 < plain.mean() < .7
    assert (plain == smooth).mean() > .99


def test_a_single_class_is_all_there_is(trained):
    mine = TextSegInferencer(trained.config, trained.weights, device='cpu')
    mine.set_classes([CLASSES[1]])
    for weight in (None, .5):
        [found] = stream_video(mine, frames_of(1), smoothing=weight)
        assert found.labels.shape == (32, 64) and not found.labels.any()


def test_one_logit_is_measured_too(tmp_path):
    """Of labels that are its own the score is perfect."""
    cfg = of_one_logit(tmp_path)
    weights = save_weights(tmp_path / 'w.pth', stir(MODELS.build(cfg.model)),
                           ('a', 'b'))
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    model = init_model(cfg.filename, weights, 'cpu')
    scores = [
        inference_model(model, info['img_path']).seg_logits.data[0]
        for info in infos
    ]
    cfg.model.decode_head.threshold = torch.stack(scores).median().item()
    cfg.dump(cfg.filename)
    for info, score in zip(infos, scores):
        labels = score > cfg.model.decode_head.threshold
        cv2.imwrite(info['seg_map_path'], labels.byte().numpy())
    path = tmp_path / 'l.jsonl'
    load_tool('analysis_tools/video.py').main([
        'smoothing', cfg.filename, weights, '--smoothing', '0', '--device',
        'cpu', '--ledger',
        str(path)
    ])
    assert Ledger(path).entries[0]['val']['mIoU'] == 100


@each_case('pattern', [None, '(img(?=/[0-2])|im(?=g/[3-5]))'])
def test_smoothing_is_measured(trained, inferencer, monkeypatch, tmp_path,
                               capsys, pattern):
    """As of what the stream gives, of each video for itself."""
    # The images are of different scenes; let them be of one.
    monkeypatch.setattr(LogitSmoother.__init__, '__defaults__', (1e9, ))
    tool, path = load_tool('analysis_tools/video.py'), tmp_path / 'l.jsonl'
    tool.main([
        'smoothing', trained.config, trained.weights, '--smoothing', '0',
        '0.7', '--device', 'cpu', '--network', 'tiny', '--ledger',
        str(path), *(['--video', pattern] if pattern else [])
    ])
    out = capsys.readouterr().out
    found = {float(e['arm']): e['val'] for e in Ledger(path).entries}
    dataset = DATASETS.build(inferencer.cfg.val_dataloader.dataset)
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    parts = [infos[:3], infos[3:]] if pattern else [infos]
    for weight, expected in found.items():
        metric = consistency(dataset.metainfo['classes'], video=pattern)
        for part in parts:
            frames = [cv2.imread(info['img_path']) for info in part]
            stream = stream_video(inferencer, frames, smoothing=weight or None)
            for item, info in zip(stream, part):
                label = cv2.imread(info['seg_map_path'], cv2.IMREAD_GRAYSCALE)
                pair = map(torch.from_numpy, (label, item.labels))
                metric.process({}, [sample(info['img_path'], *pair)])
        metrics = metric.evaluate(len(infos))
        assert expected == pytest.approx({k: metrics[k]
                                          for k in expected},
                                         nan_ok=True)
    assert found[0.] != pytest.approx(found[.7], nan_ok=True)
    assert f'| tiny | 0.7 | {found[.7]["mIoU"]:.2f} |' in out


def test_network_and_pipeline_are_timed(trained, four, tmp_path, capsys):
    tool, path = load_tool('analysis_tools/video.py'), tmp_path / 'l.jsonl'
    tool.main([
        'speed', four, trained.config, trained.weights,
        *'--batch-size 2 --runs 2 --warmup 0 --device cpu'.split(), '--ledger',
        str(path)
    ])
    entry, = Ledger(path).entries
    for times in entry['val'].values():
        assert len(times['runs_ms']) == 2
        assert times['fps'] * times['median_ms'] == pytest.approx(4e3)
    out = capsys.readouterr().out
    row = f'| {1 / entry["val"]["pipeline"]["ratio"]:.2f} ['
    assert '4 frames of' in out and row in out
    tool.main(['table', str(path)])
    assert row in capsys.readouterr().out


def test_mistakes_of_the_video_tool_are_said(tmp_path):
    tool, path = load_tool('analysis_tools/video.py'), tmp_path / 'l.jsonl'
    for words, said in (
        (['table', path], 'l.jsonl has no entry'),
        (['speed', 'in.avi', 'no_model'], 'no_model'),
        (['smoothing', 'no_model'], 'no_model'),
    ):
        with pytest.raises(SystemExit, match=said):
            tool.main([str(word) for word in words])
    path.write_text('{')
    with pytest.raises(SystemExit, match='line 1 is damaged'):
        tool.main(['smoothing', 'no_model', '--ledger', str(path)])


def test_the_published_page_is_what_the_ledger_says(capsys):
    results = ROOT / 'docs' / 'results'
    load_tool('analysis_tools/video.py').main(
        ['table', str(results / 'video.jsonl')])
    page = (results / 'video.md').read_text(encoding='utf-8')
    assert capsys.readouterr().out == page


def test_memory_does_not_grow_with_the_video(inferencer):
    """The decoder waits for the network."""
    decoded, ahead = [], []

    def frames():
        for frame in frames_of(60):
            decoded.append(frame)
            yield frame

    for item in stream_video(inferencer, frames(), batch_size=2):
        ahead.append(len(decoded) - item.number)
    assert len(ahead) == 60 and max(ahead) <= 3 * 2 + 2


def written(path):
    """Frames of a video."""
    return list(read_frames(str(path))[0])


def test_video_is_written(inferencer, tmp_path):
    out, frames, shown = str(tmp_path / 'out.avi'), frames_of(5), []
    options = dict(batch_size=2, legend=False, progress=False)
    assert segment_video(inferencer, frames, out, shown.append, **options) == 5
    found = written(out)
    assert len(found) == 5 and found[0].shape == frames[0].shape
    expected = inferencer(
        frames[0], return_vis=True, legend=False)['visualization']
    assert np.array_equal(shown[0], expected[..., ::-1])
    # MJPG is lossy: in the mean over blocks.
    both = np.stack([found[0], shown[0]]).astype(float)
    first, second = both.reshape(2, 4, 8, 8, 8, 3).mean((2, 4))
    assert np.abs(first - second).mean() < 8
    assert threading.active_count() < 12


def test_what_is_no_frame_is_told(inferencer):
    for frame in (np.zeros((32, 64, 3),
                           np.float32), np.zeros((32, 64), np.uint16)):
        with pytest.raises(ValueError, match='an image must be uint8'):
            next(stream_video(inferencer, [frame]))


def test_a_video_is_never_written_over(inferencer, four, tmp_path):
    before = (tmp_path / 'in.avi').read_bytes()
    with pytest.raises(ValueError, match='is the video that is read'):
        segment_video(inferencer, four, str(tmp_path / '.' / 'in.avi'))
    # What is no file is another thing.
    for source in ('rtsp://127.0.0.1:1/x', str(tmp_path / 'gone.avi')):
        with pytest.raises(VideoError):
            segment_video(inferencer, source, four)
    assert (tmp_path / 'in.avi').read_bytes() == before


def test_bad_videos_are_told_and_what_was_done_is_kept(inferencer, tmp_path):
    out, bad = str(tmp_path / 'out.avi'), tmp_path / 'bad.mp4'
    bad.write_bytes(b'no video' * 100)
    other = np.zeros((16, 64, 3), np.uint8)
    cases = [
        ([], 'no frames'),
        (str(bad), 'cannot be decoded'),
        (str(tmp_path / 'nothing.mp4'), 'there is no video'),
        ([*frames_of(3), other], 'frame 3 is 64x16, but those before'),
    ]
    for frames, message in cases:
        with pytest.raises(VideoError, match=message):
            segment_video(
                inferencer, frames, out, batch_size=2, progress=False)
    assert len(written(out)) == 3


@pytest.mark.parametrize('said, rate', [(23.976, 23.976), (0., 25.),
                                        (-1., 25.), (float('nan'), 25.),
                                        (float('inf'), 25.), (90000., 25.)])
def test_rates_that_cameras_say(said, rate):
    camera = SimpleNamespace(get={cv2.CAP_PROP_FPS: said}.get)
    assert frame_rate(camera) == rate


def test_a_video_that_ends_early_is_told(inferencer, four, monkeypatch):
    path, messages = Path(four), []
    frames, fps, _ = read_frames(path)
    monkeypatch.setattr(video, 'read_frames', lambda source: (frames, fps, 9))
    monkeypatch.setattr(video, 'print_log',
                        lambda text, *args: messages.append(text))
    assert segment_video(inferencer, path, progress=False) == 4
    assert 'after 4 of the 9 frames' in messages[0]
