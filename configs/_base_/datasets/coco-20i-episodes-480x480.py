# HSNet's lists (https://github.com/juhongm999/hsnet, data/splits/coco) go to
# data/COCO2014/splits/coco, its label maps to data/COCO2014/annotations.
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
        type='COCO20iEpisodes',
        data_root='data/COCO2014',
        data_prefix=dict(img_path='', seg_map_path='annotations'),
        pipeline=test_pipeline))
test_evaluator = dict(type='EpisodeIoUMetric')
test_cfg = dict(type='TestLoop')
