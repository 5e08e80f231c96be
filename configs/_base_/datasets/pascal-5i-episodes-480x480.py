# HSNet's lists (https://github.com/juhongm999/hsnet, data/splits/pascal) go to
# data/VOCdevkit/VOC2012/splits/pascal.
test_pipeline = [
    # As torchvision reads and resizes images.
    dict(type='LoadImageFromFile', imdecode_backend='pillow'),
    dict(type='Resize', scale=(480, 480), keep_ratio=False, backend='pillow'),
    dict(type='LoadAnnotations', imdecode_backend='pillow'),
    dict(type='EpisodeLabels'),
    dict(
        type='PackSegInputs',
        meta_keys=('img_path', 'seg_map_path', 'ori_shape', 'img_shape',
                   'pad_shape', 'scale_factor', 'class_id'))
]
test_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='PASCAL5iEpisodes',
        data_root='data/VOCdevkit/VOC2012',
        data_prefix=dict(
            img_path='JPEGImages', seg_map_path='SegmentationClassAug'),
        pipeline=test_pipeline))
test_evaluator = dict(type='EpisodeIoUMetric')
test_cfg = dict(type='TestLoop')
