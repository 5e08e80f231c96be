custom_hooks = [
    dict(
        switch_at=2,
        type='mmseg_textkd.engine.hooks.prompt_learner_hook.PromptLearnerHook'
    ),
]
custom_imports = dict(imports=[
    'mmseg_textkd',
])
default_hooks = dict(
    checkpoint=dict(
        by_epoch=False,
        interval=3,
        type='mmengine.hooks.checkpoint_hook.CheckpointHook'),
    logger=dict(interval=1, type='mmengine.hooks.logger_hook.LoggerHook'))
default_scope = 'mmseg'
env_cfg = dict(dist_cfg=dict(backend='gloo'))
find_unused_parameters = True
log_level = 'ERROR'
log_processor = dict(by_epoch=False)
model = dict(
    backbone=dict(
        base_channels=8,
        depth=18,
        dilations=(1, ),
        norm_cfg=dict(type='torch.nn.modules.batchnorm.BatchNorm2d'),
        num_stages=1,
        out_indices=(0, ),
        stem_channels=8,
        strides=(1, ),
        type='mmseg.models.backbones.resnet.ResNet',
        zero_init_residual=False),
    data_preprocessor=dict(
        mean=[
            128.0,
            128.0,
            128.0,
        ],
        seg_pad_val=255,
        size=(
            32,
            64,
        ),
        std=[
            64.0,
            64.0,
            64.0,
        ],
        type='mmseg.models.data_preprocessor.SegDataPreProcessor'),
    decode_head=dict(
        align_corners=False,
        channels=16,
        concat_input=False,
        dropout_ratio=0.0,
        in_channels=8,
        in_index=0,
        loss_decode=dict(
            type='mmseg.models.losses.cross_entropy_loss.CrossEntropyLoss'),
        norm_cfg=dict(type='torch.nn.modules.batchnorm.BatchNorm2d'),
        num_classes=8,
        num_convs=1,
        text=dict(
            embeddings=dict(
                dim=16,
                kind='random',
                type=
                'mmseg_textkd.models.text_providers.control_embeddings.ControlEmbeddings'
            ),
            type=
            'mmseg_textkd.models.text_providers.residual_prompt_learner.ResidualPromptLearner'
        ),
        type='mmseg_textkd.models.decode_heads.text_fcn_head.TextFCNHead'),
    test_cfg=dict(mode='whole'),
    train_cfg=dict(),
    type='mmseg.models.segmentors.encoder_decoder.EncoderDecoder')
optim_wrapper = dict(
    optimizer=dict(
        lr=0.05, momentum=0.9, type='torch.optim.sgd.SGD',
        weight_decay=0.0005),
    paramwise_cfg=dict(
        custom_keys=dict({
            '.text.': dict(decay_mult=0.0),
            'log_scale': dict(decay_mult=0.0)
        })),
    type='mmengine.optim.optimizer.optimizer_wrapper.OptimWrapper')
param_scheduler = [
    dict(
        begin=0,
        by_epoch=False,
        end=3,
        eta_min=0.0001,
        power=0.9,
        type='mmengine.optim.scheduler.lr_scheduler.PolyLR'),
]
randomness = dict(seed=0)
test_cfg = dict(type='mmengine.runner.loops.TestLoop')
test_dataloader = dict(
    batch_size=1,
    dataset=dict(
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        data_root='/tmp/p18/lazy/data',
        img_suffix='.png',
        metainfo=dict(
            classes=(
                'sky',
                'building',
                'road',
                'sidewalk',
                'pole',
                'car',
                'truck',
                'person',
            ),
            palette=[
                [
                    0,
                    0,
                    0,
                ],
                [
                    1,
                    1,
                    1,
                ],
                [
                    2,
                    2,
                    2,
                ],
                [
                    3,
                    3,
                    3,
                ],
                [
                    4,
                    4,
                    4,
                ],
                [
                    5,
                    5,
                    5,
                ],
                [
                    6,
                    6,
                    6,
                ],
                [
                    7,
                    7,
                    7,
                ],
            ]),
        pipeline=[
            dict(type='mmcv.transforms.loading.LoadImageFromFile'),
            dict(type='mmcv.transforms.loading.LoadAnnotations'),
            dict(type='mmseg.datasets.transforms.formatting.PackSegInputs'),
        ],
        seg_map_suffix='.png',
        serialize_data=False,
        type='mmseg.datasets.basesegdataset.BaseSegDataset'),
    num_workers=0,
    sampler=dict(
        shuffle=False, type='mmengine.dataset.sampler.DefaultSampler'))
test_evaluator = dict(
    iou_metrics=[
        'mIoU',
    ],
    type='mmseg.evaluation.metrics.iou_metric.IoUMetric')
train_cfg = dict(
    max_iters=3,
    type='mmengine.runner.loops.IterBasedTrainLoop',
    val_interval=3)
train_dataloader = dict(
    batch_size=2,
    dataset=dict(
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        data_root='/tmp/p18/lazy/data',
        img_suffix='.png',
        metainfo=dict(
            classes=(
                'sky',
                'building',
                'road',
                'sidewalk',
                'pole',
                'car',
                'truck',
                'person',
            ),
            palette=[
                [
                    0,
                    0,
                    0,
                ],
                [
                    1,
                    1,
                    1,
                ],
                [
                    2,
                    2,
                    2,
                ],
                [
                    3,
                    3,
                    3,
                ],
                [
                    4,
                    4,
                    4,
                ],
                [
                    5,
                    5,
                    5,
                ],
                [
                    6,
                    6,
                    6,
                ],
                [
                    7,
                    7,
                    7,
                ],
            ]),
        pipeline=[
            dict(type='mmcv.transforms.loading.LoadImageFromFile'),
            dict(type='mmcv.transforms.loading.LoadAnnotations'),
            dict(type='mmseg.datasets.transforms.formatting.PackSegInputs'),
        ],
        seg_map_suffix='.png',
        serialize_data=False,
        type='mmseg.datasets.basesegdataset.BaseSegDataset'),
    num_workers=0,
    sampler=dict(type='mmengine.dataset.sampler.InfiniteSampler'))
val_cfg = dict(type='mmengine.runner.loops.ValLoop')
val_dataloader = dict(
    batch_size=1,
    dataset=dict(
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        data_root='/tmp/p18/lazy/data',
        img_suffix='.png',
        metainfo=dict(
            classes=(
                'sky',
                'building',
                'road',
                'sidewalk',
                'pole',
                'car',
                'truck',
                'person',
            ),
            palette=[
                [
                    0,
                    0,
                    0,
                ],
                [
                    1,
                    1,
                    1,
                ],
                [
                    2,
                    2,
                    2,
                ],
                [
                    3,
                    3,
                    3,
                ],
                [
                    4,
                    4,
                    4,
                ],
                [
                    5,
                    5,
                    5,
                ],
                [
                    6,
                    6,
                    6,
                ],
                [
                    7,
                    7,
                    7,
                ],
            ]),
        pipeline=[
            dict(type='mmcv.transforms.loading.LoadImageFromFile'),
            dict(type='mmcv.transforms.loading.LoadAnnotations'),
            dict(type='mmseg.datasets.transforms.formatting.PackSegInputs'),
        ],
        seg_map_suffix='.png',
        serialize_data=False,
        type='mmseg.datasets.basesegdataset.BaseSegDataset'),
    num_workers=0,
    sampler=dict(
        shuffle=False, type='mmengine.dataset.sampler.DefaultSampler'))
val_evaluator = dict(
    iou_metrics=[
        'mIoU',
    ],
    type='mmseg.evaluation.metrics.iou_metric.IoUMetric')
work_dir = '/tmp/p18/lazy/work'
