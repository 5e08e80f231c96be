_base_ = './ebseg_vit-b16_4xb4-120k_coco-stuff164k-640x640.py'
# CLIP is larger; SAM stays ViT-B/16.
model = dict(
    image_encoder=dict(
        model='ViT-L-14-336',
        embed_dims=1024,
        num_layers=24,
        patch_size=14,
        grid_size=24,
        out_dims=768,
        scale=0.7),
    neck=dict(clip_channels=1024, clip_depths=(6, 12, 18)),
    decode_head=dict(
        text=dict(
            file='data/text_embeddings/'
            'coco_stuff_vit-l14-336-openai.safetensors',
            dim=768,
            build=dict(model='ViT-L-14-336')),
        attention_from=18,
        attention_heads=16,
        surgery_blocks=20,
        balance=dict(alpha=0.12, beta=0.4, gamma=0.6)))
optim_wrapper = dict(optimizer=dict(lr=8e-5))
