# Trained on train and val, tested on test: no validation set is left.
_base_ = './camvid-720x960-steps.py'
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[
            dict(
                type=_base_.dataset_type,
                data_root=_base_.data_root,
                data_prefix=dict(img_path=split, seg_map_path=f'{split}annot'),
                pipeline=_base_.train_pipeline) for split in ('train', 'val')
        ]))
val_dataloader = _base_.test_dataloader
