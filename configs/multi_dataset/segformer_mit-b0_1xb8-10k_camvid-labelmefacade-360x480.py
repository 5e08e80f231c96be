# What is done without words: one softmax over the united list of labels.
_base_ = [
    '../_base_/datasets/camvid-labelmefacade-360x480.py',
    '../_base_/default_runtime.py', '../_base_/schedules/schedule_10k.py'
]
model, optim_wrapper = __import__('mmseg_textkd').stock_network(
    'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
    num_classes=14,
    size=(360, 480))
default_hooks = dict(checkpoint=dict(save_best='camvid/mIoU'))
