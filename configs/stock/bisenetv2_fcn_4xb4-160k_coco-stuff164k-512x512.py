_base_ = [
    '../_base_/datasets/coco-stuff164k-512x512.py',
    '../_base_/default_runtime.py', '../_base_/schedules/schedule_160k.py'
]
model, optim_wrapper = __import__('mmseg_textkd').stock_network(
    'bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py',
    num_classes=171,
    size=(512, 512))
