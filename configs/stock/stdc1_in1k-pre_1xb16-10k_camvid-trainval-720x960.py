_base_ = [
    '../_base_/datasets/camvid-trainval-720x960-steps.py',
    '../_base_/default_runtime.py', '../_base_/schedules/schedule_10k-stdc.py'
]
model = __import__('mmseg_textkd').stock_network(
    'stdc/stdc1_in1k-pre_4xb12-80k_cityscapes-512x1024.py',
    num_classes=11,
    size=(720, 960),
    min_kept=690000)[0]
train_dataloader = dict(batch_size=16)
