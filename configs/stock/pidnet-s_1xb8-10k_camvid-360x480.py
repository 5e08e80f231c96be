_base_ = [
    '../_base_/datasets/camvid-360x480.py', '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_10k.py'
]
model, optim_wrapper = __import__('mmseg_textkd').stock_network(
    'pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py',
    num_classes=11,
    size=(360, 480))
train_dataloader = __import__('mmseg_textkd').insert_transform(
    _base_.train_dataloader,
    dict(type='GenerateEdge', edge_width=4),
    before='PackSegInputs')
