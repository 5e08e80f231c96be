# MMSegmentation trains SegNeXt on ADE20K only.
_base_ = [
    '../_base_/datasets/cityscapes-1024x1024.py',
    '../_base_/default_runtime.py', '../_base_/schedules/schedule_160k.py'
]
model, optim_wrapper = __import__('mmseg_textkd').stock_network(
    'segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py',
    num_classes=19,
    size=(1024, 1024))
train_dataloader = dict(batch_size=4, num_workers=4)
