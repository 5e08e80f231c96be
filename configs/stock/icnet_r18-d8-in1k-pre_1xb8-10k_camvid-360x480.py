_base_ = [
    '../_base_/datasets/camvid-360x480.py', '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_10k.py'
]
model, optim_wrapper = __import__('mmseg_textkd').stock_network(
    'icnet/icnet_r18-d8-in1k-pre_4xb2-160k_cityscapes-832x832.py',
    num_classes=11,
    size=(360, 480))
