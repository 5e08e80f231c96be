# What is done without words: one softmax over the united list of labels.
_base_ = [
    '../_base_/datasets/camvid-labelmefacade-360x480.py',
    '../_base_/default_runtime.py', '../_base_/schedules/schedule_10k.py'
]
model, optim_wrapper = __import__('mmseg_textkd').stock_network(
    'bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py',
    num_classes=14,
    size=(360, 480))
default_hooks = dict(checkpoint=dict(save_best='camvid/mIoU'))
