# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Videos: data sets, consistency, and the stream of the inferencer."""
import threading

import cv2
import numpy as np
import pytest
import torch
from each_case import each_case
from mmengine.registry import DefaultScope
from mmseg.registry import DATASETS
from text_runs import RUNS, make
from tiny import PIPELINE
from tool_modules import load_tool

from mmseg_textkd.apis import TextSegInferencer
from mmseg_textkd.apis.video import (LogitSmoother, VideoError, read_frames,
                                     segment_video, stream_video)
from mmseg_textkd.datasets.toy_scenes_generator import generate_toy_videos
from mmseg_textkd.evaluation import VideoConsistencyMetric


# ------------------------------------------------------------------ metric
def sample(path, label, predicted):
    return dict(
        img_path=path,
        gt_sem_seg=dict(data=label[None]),
        pred_sem_seg=dict(data=predicted[None]))


@each_case('correct', [True, False])
def test_consistency_against_a_naive_count(correct):
    generator = torch.Generator().manual_seed(0)
    metric = VideoConsistencyMetric(
        windows=(2, 3), correct=correct, iou_metrics=['mIoU'])
    metric.dataset_meta = dict(classes=('a', 'b', 'c'))
    videos = {}
    for name, length in (('v', 5), ('w', 4)):
        labels = torch.randint(
            3, (1, 6, 8), generator=generator).repeat(length, 1, 1)
        change = torch.rand(labels.shape, generator=generator) < .2
        labels[change] = torch.randint(
            3, (int(change.sum()), ), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < .1] = 255
        predicted = labels.clone()
        wrong = torch.rand(labels.shape, generator=generator) < .3
        predicted[wrong] = 2
        predicted[predicted == 255] = 0
        videos[name] = labels, predicted
        for t in range(length):
            metric.process(
                {},
                [sample(f'data/{name}/{t:03d}.png', labels[t], predicted[t])])
    found = metric.evaluate(9)
    for window in (2, 3):
        shares = []
        for labels, predicted in videos.values():
            for start in range(len(labels) - window + 1):
                stays = met = 0
                for y in range(6):
                    for x in range(8):
                        of_labels = labels[start:start + window, y, x].tolist()
                        of_pred = predicted[start:start + window, y,
                                            x].tolist()
                        if len(set(of_labels)) > 1 or of_labels[0] == 255:
                            continue
                        stays += 1
                        met += (
                            of_pred == of_labels if correct else len(
                                set(of_pred)) == 1)
                if stays:
                    shares.append(met / stays)
        assert found[f'mVC_{window}'] == pytest.approx(
            100 * np.mean(shares), abs=.006)
    every = [torch.cat([v[k] for v in videos.values()]) for k in (0, 1)]
    valid = every[0] != 255
    weighted = 0
    for k in range(3):
        a, b = ((part == k) & valid for part in every)
        weighted += a.sum() / valid.sum() * (a & b).sum() / (a | b).sum()
    assert found['wIoU'] == pytest.approx(100 * weighted.item(), abs=.006)


def test_frames_must_come_in_their_order():
    frame = torch.zeros(2, 2, dtype=torch.long)

    def process(*paths, **options):
        metric = VideoConsistencyMetric(iou_metrics=['mIoU'], **options)
        metric.dataset_meta = dict(classes=('a', 'b'))
        for path in paths:
            metric.process({}, [sample(path, frame, frame)])
        return metric

    with pytest.raises(ValueError, match='must come in their order'):
        process('v/2.png', 'v/1.png')
    with pytest.raises(ValueError, match='do not shuffle'):
        process('v/1.png', 'w/1.png', 'v/2.png')
    # The sequences of CamVid lie in one folder.
    camvid = dict(video=r'([^/]+)_[^/]+$')
    process('v/0001TP_9.png', 'v/0006R0_1.png', 'v/0006R0_2.png', **camvid)
    with pytest.raises(ValueError, match='does not fit the `video` pattern'):
        process('v/1.png', **camvid)
    metric = process('v/1.png')
    wide = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match='has the size'):
        metric.process({}, [sample('v/2.png', wide, wide)])


# --------------------------------------------------------------- data sets
def test_toy_videos_move_and_are_labeled(tmp_path):
    root = tmp_path / 'videos'
    generate_toy_videos(root, 2, 6, height=64, width=96)
    dataset = DATASETS.build(
        dict(
            type='VideoFramesDataset',
            data_root=str(root),
            img_suffix='.png',
            metainfo=dict(classes=tuple('abcdefgh')),
            pipeline=PIPELINE))
    assert len(dataset) == 12
    assert [i['video'] for i in map(dataset.get_data_info, range(12))
            ] == ['video00'] * 6 + ['video01'] * 6
    first, second, last = (dataset[i] for i in (0, 1, 5))
    labels = [
        s['data_samples'].gt_sem_seg.data[0] for s in (first, second, last)
    ]
    assert first['inputs'].shape == (3, 64, 96) and labels[0].shape == (64, 96)
    assert len(labels[0].unique()) > 3
    # A little from frame to frame, and more over the whole video.
    moved = [(labels[0] != other).float().mean() for other in labels[1:]]
    assert 0 < moved[0] < moved[1]
    with pytest.raises(FileExistsError, match='nothing was touched'):
        generate_toy_videos(root)


def test_vspw_in_its_layout(tmp_path):
    for video, frames in (('a', 2), ('b', 1), ('c', 1)):
        for folder in ('origin', 'mask'):
            (tmp_path / 'data' / video / folder).mkdir(parents=True)
        for t in range(frames):
            where = tmp_path / 'data' / video
            cv2.imwrite(
                str(where / f'origin/{t:08d}.jpg'),
                np.zeros((4, 6, 3), np.uint8))
            label = np.array([[0, 1, 124, 254, 255, 2]] * 4, np.uint8)
            cv2.imwrite(str(where / f'mask/{t:08d}.png'), label)
    (tmp_path / 'val.txt').write_text('b\na\n')
    cfg = dict(type='VSPWDataset', data_root=str(tmp_path), pipeline=PIPELINE)
    dataset = DATASETS.build(cfg)
    assert [i['video']
            for i in map(dataset.get_data_info, range(3))] == ['b', 'a', 'a']
    labels = dataset[0]['data_samples'].gt_sem_seg.data[0, 0].tolist()
    assert labels == [255, 0, 123, 255, 255, 1]
    classes = dataset.metainfo['classes']
    assert len(set(classes)) == 124
    assert (classes[0], classes[123]) == ('wall', 'train')
    (tmp_path / 'val.txt').write_text('nowhere\n')
    with pytest.raises(FileNotFoundError, match='nowhere has no'):
        DATASETS.build(cfg)


# ------------------------------------------------------------------ stream
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


def frames_of(number, size=(32, 64), seed=0):
    """A scene that changes a little from frame to frame."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 230, (*size, 3))
    return [(first + rng.integers(0, 25, (*size, 3))).astype(np.uint8)
            for _ in range(number)]


def write_video(path, number):
    writer = cv2.VideoWriter(
        str(path), cv2.VideoWriter_fourcc(*'MJPG'), 25, (64, 32))
    for frame in frames_of(number):
        writer.write(frame)
    writer.release()
    return str(path)


def test_stream_is_frame_by_frame(inferencer):
    frames = frames_of(7)
    found = list(stream_video(inferencer, frames, batch_size=3))
    assert [item.number for item in found] == list(range(7))
    for item, frame in zip(found, frames):
        assert np.array_equal(item.frame, frame)
        assert np.array_equal(item.labels, inferencer(frame)['predictions'])


def test_smoothing_is_an_average_from_cut_to_cut(inferencer):
    scenes = [frames_of(3), [255 - f for f in frames_of(2, seed=0)]]
    frames = [frame for scene in scenes for frame in scene]
    found = list(stream_video(inferencer, frames, batch_size=2, smoothing=.7))
    number = 0
    for scene in scenes:
        average = None
        for frame in scene:
            data = inferencer.collate_fn([inferencer.pipeline(frame)])
            batch = inferencer.model.data_preprocessor(data, False)
            out, = inferencer.model(**batch, mode='predict')
            logits = out.seg_logits.data
            average = logits if average is None else (.7 * average +
                                                      .3 * logits)
            agree = (average.argmax(0).numpy() == found[number].labels)
            assert agree.mean() > .999
            number += 1
    plain = list(stream_video(inferencer, frames))
    assert any((a.labels != b.labels).any() for a, b in zip(plain, found))
    with pytest.raises(ValueError, match='between 0 and 1'):
        next(stream_video(inferencer, frames, smoothing=1.))


def test_smoothing_is_measured(trained, inferencer, monkeypatch, capsys):
    """As of what the stream gives."""
    # The images are of different scenes; let them be of one.
    monkeypatch.setattr(LogitSmoother.__init__, '__defaults__', (1e9, ))
    tool = load_tool('analysis_tools/video_smoothing.py')
    found = tool.main([
        str(trained.config),
        str(trained.weights), '--smoothing', '0', '0.7', '--device', 'cpu'
    ])
    dataset = DATASETS.build(inferencer.cfg.val_dataloader.dataset)
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    frames = [cv2.imread(info['img_path']) for info in infos]
    for weight, expected in found.items():
        metric = VideoConsistencyMetric(iou_metrics=['mIoU'])
        metric.dataset_meta = dataset.metainfo
        for item, info in zip(
                stream_video(inferencer, frames, smoothing=weight or None),
                infos):
            label = cv2.imread(info['seg_map_path'], cv2.IMREAD_GRAYSCALE)
            metric.process({}, [
                sample(info['img_path'], torch.from_numpy(label),
                       torch.from_numpy(item.labels))
            ])
        assert metric.evaluate(len(infos)) == pytest.approx(
            expected, nan_ok=True)
    assert found[0.] != pytest.approx(found[.7], nan_ok=True)
    assert f'| 0.7 | {found[.7]["mIoU"]:.2f} |' in capsys.readouterr().out


def test_network_and_pipeline_are_timed(trained, tmp_path, capsys):
    found = load_tool('analysis_tools/benchmark_video.py').main([
        write_video(tmp_path / 'in.avi', 5),
        str(trained.config),
        str(trained.weights), '--batch-size', '2', '--runs', '2', '--warmup',
        '0', '--device', 'cpu'
    ])
    for times in found.values():
        assert len(times['runs_ms']) == 2
        assert times['fps'] * times['median_ms'] == pytest.approx(5e3)
    out = capsys.readouterr().out
    ratio = 1 / found['pipeline']['ratio']
    assert '5 frames of' in out and f'| {ratio:.3f} [' in out


def test_memory_does_not_grow_with_the_video(inferencer):
    """The decoder waits for the network."""
    decoded, ahead = [0], []

    def frames():
        for frame in frames_of(60):
            decoded[0] += 1
            yield frame

    for item in stream_video(inferencer, frames(), batch_size=2):
        ahead.append(decoded[0] - item.number)
    assert len(ahead) == 60 and max(ahead) <= 3 * 2 + 2


def written(path):
    """Frames of a video."""
    return list(read_frames(str(path))[0])


def test_video_is_written(inferencer, tmp_path):
    out = str(tmp_path / 'out.avi')
    frames = frames_of(5)
    shown = []
    assert segment_video(
        inferencer,
        frames,
        out,
        lambda image: shown.append(image),
        batch_size=2,
        legend=False,
        progress=False) == 5
    found = written(out)
    assert len(found) == 5 and found[0].shape == frames[0].shape
    expected = inferencer(
        frames[0], return_vis=True, legend=False)['visualization']
    assert np.array_equal(shown[0], expected[..., ::-1])
    # MJPG is lossy: in the mean over blocks.
    small = [
        cv2.resize(image, (8, 4), interpolation=cv2.INTER_AREA)
        for image in (found[0], shown[0])
    ]
    assert np.abs(small[0].astype(int) - small[1]).mean() < 8
    assert threading.active_count() < 12


def test_bad_videos_are_told_and_what_was_done_is_kept(inferencer, tmp_path):
    out = str(tmp_path / 'out.avi')
    other = [np.zeros((16, 64, 3), np.uint8)]
    with pytest.raises(VideoError, match='frame 3 is 64x16, but those before'):
        segment_video(
            inferencer,
            frames_of(3) + other,
            out,
            batch_size=2,
            progress=False)
    assert len(written(out)) == 3
    with pytest.raises(VideoError, match='no frames'):
        segment_video(inferencer, [], progress=False)
    (tmp_path / 'bad.mp4').write_bytes(b'no video' * 100)
    with pytest.raises(VideoError, match='cannot be decoded'):
        segment_video(inferencer, str(tmp_path / 'bad.mp4'), progress=False)
    with pytest.raises(VideoError, match='there is no video'):
        read_frames(str(tmp_path / 'nothing.mp4'))


def test_a_video_that_ends_early_is_told(inferencer, tmp_path, monkeypatch):
    from mmseg_textkd.apis import video
    path = write_video(tmp_path / 'in.avi', 4)
    frames, fps, _ = read_frames(path)
    messages = []
    monkeypatch.setattr(video, 'read_frames', lambda source: (frames, fps, 9))
    monkeypatch.setattr(video, 'print_log',
                        lambda text, *args: messages.append(text))
    assert segment_video(inferencer, path, progress=False) == 4
    assert 'after 4 of the 9 frames' in messages[0]
