_base_ = [
    '../_base_/models/lseg_dpt_vit-l16.py',
    '../_base_/datasets/pascal-5i-episodes-480x480.py',
    '../_base_/default_runtime.py', '../_base_/text/lseg_vit-b32_pascal-5i.py'
]
model = dict(
    decode_head=dict(
        type='LSegEpisodeHead',
        num_classes=2,
        text=_base_.text_provider.embeddings),
    test_cfg=dict(_delete_=True, mode='whole'))
