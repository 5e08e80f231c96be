_base_ = [
    '../_base_/datasets/camvid-360x480.py', '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_10k.py'
]
model, optim_wrapper = __import__('mmseg_textkd').stock_network(
    'bisenetv1/bisenetv1_r18-d32-in1k-pre_4xb4-160k_cityscapes-1024x1024.py',
    num_classes=11,
    size=(360, 480))
