_base_ = [
    '../_base_/datasets/cityscapes-512x1024-steps.py',
    '../_base_/default_runtime.py', '../_base_/schedules/schedule_160k-stdc.py'
]
model = __import__('mmseg_textkd').stock_network(
    'stdc/stdc2_in1k-pre_4xb12-80k_cityscapes-512x1024.py',
    num_classes=19,
    size=(512, 1024),
    min_kept=390000)[0]
train_dataloader = dict(batch_size=12)
