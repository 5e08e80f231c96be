_base_ = [
    '../_base_/datasets/toy_scenes-128x256.py', '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_200i.py'
]
model, optim_wrapper = __import__('mmseg_textkd').stock_network(
    'stdc/stdc1_4xb12-80k_cityscapes-512x1024.py',
    num_classes=8,
    size=(128, 256))
