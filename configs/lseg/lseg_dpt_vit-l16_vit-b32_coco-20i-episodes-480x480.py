_base_ = [
    '../_base_/models/lseg_dpt_vit-l16.py',
    '../_base_/datasets/coco-20i-episodes-480x480.py',
    '../_base_/default_runtime.py', '../_base_/text/lseg_vit-b32_coco-20i.py'
]
model = dict(
    decode_head=dict(
        type='LSegEpisodeHead',
        num_classes=2,
        text=_base_.text_provider.embeddings),
    test_cfg=dict(_delete_=True, mode='whole'))
