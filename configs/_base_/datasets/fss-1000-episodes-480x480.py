# https://github.com/HKUSTCV/FSS-1000, unpacked into data/FSS-1000.
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
        type='FSS1000Episodes',
        data_root='data/FSS-1000',
        data_prefix=dict(img_path=''),
        pipeline=test_pipeline))
test_evaluator = dict(type='EpisodeIoUMetric')
test_cfg = dict(type='TestLoop')
