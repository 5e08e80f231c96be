_base_ = [
    '../_base_/datasets/mapillary-v1-512x1024.py',
    '../_base_/default_runtime.py', '../_base_/schedules/schedule_160k.py'
]
model, optim_wrapper = __import__('mmseg_textkd').stock_network(
    'ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py',
    num_classes=65,
    size=(512, 1024))
train_dataloader = dict(batch_size=4)
