# EBSeg with CLIP ViT-B/16 and SAM ViT-B/16, trained on COCO-Stuff.
data_preprocessor = dict(
    type='SegDataPreProcessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    size=(640, 640),
    pad_val=0,
    seg_pad_val=255)
model = dict(
    type='EBSeg',
    data_preprocessor=data_preprocessor,
    image_encoder=dict(
        type='FrozenCLIPViT',
        model='ViT-B-16',
        pretrained='openai',
        embed_dims=768,
        num_layers=12,
        patch_size=16,
        grid_size=14,
        out_dims=512,
        scale=0.5),
    backbone=dict(type='FrozenSAMViT', model='samvit_base_patch16.sa1b'),
    neck=dict(
        type='CLIPSAMNeck',
        in_channels=768,
        clip_channels=768,
        clip_depths=(3, 6, 9),
        channels=256,
        num_layers=6),
    decode_head=dict(
        type='EBSegHead',
        num_classes=171,
        channels=256,
        text=dict(
            type='ClassEmbeddings',
            file='data/text_embeddings/coco_stuff_vit-b16-openai.safetensors',
            classes='coco_stuff',
            dim=512,
            build=dict(
                vocabulary='coco_stuff',
                model='ViT-B-16',
                pretrained='openai',
                templates='vild')),
        train_classes='coco_stuff',
        decoder=dict(type='MaskDecoder', num_queries=100, num_layers=9),
        attention_from=9,
        attention_heads=12,
        surgery_blocks=10,
        balance=dict(alpha=0.09, beta=0.3, gamma=0.7),
        loss=dict(type='EBSegLoss')),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
