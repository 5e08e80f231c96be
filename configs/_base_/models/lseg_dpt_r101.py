# As lseg_dpt_vit-l16.py, with ResNet-101, as the few-shot part of LSeg has it.
_base_ = './lseg_dpt_vit-l16.py'
data_preprocessor = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=101,
        out_indices=(0, 1, 2, 3),
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        style='pytorch'),
    decode_head=dict(
        in_channels=(256, 512, 1024, 2048),
        patch_size=None,
        post_process_channels=(256, 512, 1024, 2048)))
