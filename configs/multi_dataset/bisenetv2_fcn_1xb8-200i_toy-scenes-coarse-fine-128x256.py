# What is done without words: one softmax over the united list of labels.
_base_ = [
    '../_base_/datasets/toy_scenes-coarse-fine-128x256.py',
    '../_base_/default_runtime.py', '../_base_/schedules/schedule_200i.py'
]
model, optim_wrapper = __import__('mmseg_textkd').stock_network(
    'bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py',
    num_classes=9,
    size=(128, 256))
default_hooks = dict(checkpoint=dict(save_best='coarse/mIoU'))
