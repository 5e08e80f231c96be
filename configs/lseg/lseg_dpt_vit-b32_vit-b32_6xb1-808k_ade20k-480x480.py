_base_ = './lseg_dpt_vit-l16_vit-b32_6xb1-808k_ade20k-480x480.py'
model = dict(
    backbone=dict(
        patch_size=32,
        embed_dims=768,
        num_layers=12,
        num_heads=12,
        out_indices=(2, 5, 8, 11),
        init_cfg=dict(checkpoint='pretrain/vit-b32_p32_384.pth')),
    decode_head=dict(
        in_channels=(768, 768, 768, 768),
        patch_size=32,
        embed_dims=768,
        post_process_channels=(96, 192, 384, 768)))
