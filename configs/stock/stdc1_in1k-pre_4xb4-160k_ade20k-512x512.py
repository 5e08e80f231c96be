_base_ = [
    '../_base_/datasets/ade20k-512x512.py', '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_160k.py'
]
model, optim_wrapper = __import__('mmseg_textkd').stock_network(
    'stdc/stdc1_in1k-pre_4xb12-80k_cityscapes-512x1024.py',
    num_classes=150,
    size=(512, 512))
