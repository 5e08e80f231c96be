_base_ = [
    '../_base_/datasets/cityscapes-768x1536-steps.py',
    '../_base_/default_runtime.py', '../_base_/schedules/schedule_160k-stdc.py'
]
model = __import__('mmseg_textkd').stock_network(
    'stdc/stdc1_in1k-pre_4xb12-80k_cityscapes-512x1024.py',
    num_classes=19,
    size=(768, 1536),
    min_kept=880000)[0]
train_dataloader = dict(batch_size=12)
