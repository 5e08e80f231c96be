# CamVid and LabelMeFacade together: each keeps its classes, and classes of the
# same name are one word; 14 words in all. LabelMeFacade has no validation part:
# every eighth of its test images stands in for one.
_base_ = './camvid-360x480.py'
camvid = dict(type='CamVidDataset', data_root='data/camvid')
labelmefacade = dict(
    type='LabelMeFacadeDataset', data_root='data/labelmefacade')
# `CheckLabels` is for the classes of CamVid; MultiDataset checks those of each.
both_train_pipeline = [
    step for step in _base_.train_pipeline if step['type'] != 'CheckLabels'
]
both_test_pipeline = [
    step for step in _base_.test_pipeline if step['type'] != 'CheckLabels'
]
both = dict(
    _delete_=True, type='MultiDataset', names=['camvid', 'labelmefacade'])
train_dataloader = dict(
    sampler=dict(_delete_=True, type='BalancedDatasetSampler'),
    dataset=dict(
        datasets=[
            dict(
                data_prefix=dict(img_path='train', seg_map_path='trainannot'),
                pipeline=both_train_pipeline,
                **camvid),
            dict(
                data_prefix=dict(
                    img_path='img/train', seg_map_path='ann/train'),
                pipeline=both_train_pipeline,
                **labelmefacade)
        ],
        **both))
val_dataloader = dict(
    dataset=dict(
        datasets=[
            dict(
                data_prefix=dict(img_path='val', seg_map_path='valannot'),
                pipeline=both_test_pipeline,
                **camvid),
            dict(
                data_prefix=dict(img_path='img/test', seg_map_path='ann/test'),
                indices=list(range(0, 845, 8)),
                pipeline=both_test_pipeline,
                **labelmefacade)
        ],
        **both))
test_dataloader = dict(
    dataset=dict(
        datasets=[
            dict(
                data_prefix=dict(img_path='test', seg_map_path='testannot'),
                pipeline=both_test_pipeline,
                **camvid),
            dict(
                data_prefix=dict(img_path='img/test', seg_map_path='ann/test'),
                pipeline=both_test_pipeline,
                **labelmefacade)
        ],
        **both))
val_evaluator = [
    dict(type='DatasetIoUMetric', dataset=name, iou_metrics=['mIoU'])
    for name in ('camvid', 'labelmefacade')
]
test_evaluator = val_evaluator
