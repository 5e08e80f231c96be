_base_ = [
    '../_base_/datasets/toy_scenes-128x256.py', '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_200i.py'
]
model, optim_wrapper = __import__('mmseg_textkd').stock_network(
    'ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py',
    num_classes=8,
    size=(128, 256))
model['backbone']['init_cfg'] = None  # a toy starts from scratch
