# ToyScenes as two data sets of 200 training scenes: in the first car and truck
# are both `vehicle`, the second tells them apart. 9 words in all.
_base_ = './toy_scenes-128x256.py'
toy_scenes = dict(type='ToyScenesDataset', data_root='data/toy_scenes/')
both = dict(
    _delete_=True,
    type='MultiDataset',
    names=['coarse', 'fine'],
    words=dict(coarse=dict(car='vehicle', truck='vehicle')),
    # A scene of the first that shows a car is right if it is called a car.
    relations=dict(vehicle=['car', 'truck']))
train_dataloader = dict(
    sampler=dict(_delete_=True, type='BalancedDatasetSampler'),
    dataset=dict(
        datasets=[
            dict(
                data_prefix=dict(
                    img_path='img_dir/train', seg_map_path='ann_dir/train'),
                indices=list(part),
                pipeline=_base_.train_pipeline,
                **toy_scenes) for part in (range(200), range(200, 400))
        ],
        **both))
val_dataloader = dict(
    dataset=dict(
        datasets=[
            dict(
                data_prefix=dict(
                    img_path='img_dir/val', seg_map_path='ann_dir/val'),
                indices=list(part),
                pipeline=_base_.test_pipeline,
                **toy_scenes) for part in (range(50), range(50, 100))
        ],
        **both))
test_dataloader = val_dataloader
val_evaluator = [
    dict(type='DatasetIoUMetric', dataset=name, iou_metrics=['mIoU'])
    for name in ('coarse', 'fine')
]
test_evaluator = val_evaluator
