_base_ = [
    '../_base_/datasets/camvid-360x480.py', '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_10k.py'
]
model, optim_wrapper = __import__('mmseg_textkd').stock_network(
    'cgnet/cgnet_fcn_4xb8-60k_cityscapes-512x1024.py',
    num_classes=11,
    size=(360, 480))
