# A toy: trained on six classes of ToyScenes, asked for all eight. Cars and
# trucks are ignored in training.
_base_ = [
    '../_base_/models/ebseg_vit-b16.py',
    '../_base_/datasets/toy_scenes-128x256.py', '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_200i.py'
]
seen = ['sky', 'building', 'road', 'sidewalk', 'pole', 'person']
train_dataloader = dict(
    batch_size=4, dataset=dict(metainfo=dict(classes=seen)))
norm_cfg = dict(type='GN', num_groups=8)
model = dict(
    data_preprocessor=dict(size=(128, 256)),
    image_encoder=dict(
        model='toyclip',
        pretrained=None,
        embed_dims=64,
        num_layers=3,
        patch_size=8,
        grid_size=4,
        out_dims=64,
        scale=1.0),
    # Shaped like SAM's, with random weights.
    backbone=dict(
        _delete_=True,
        type='FrozenSAMViT',
        model=dict(
            img_size=128,
            patch_size=8,
            embed_dim=32,
            depth=4,
            num_heads=2,
            window_size=4,
            global_attn_indexes=(0, 1, 2, 3),
            use_rel_pos=True,
            num_classes=0),
        seed=0,
        patch_size=8,
        embed_dims=32,
        grid_size=16),
    neck=dict(
        in_channels=32,
        clip_channels=64,
        clip_depths=(1, 2, 3),
        channels=32,
        num_layers=1,
        num_heads=4,
        feedforward=64,
        norm_cfg=norm_cfg),
    decode_head=dict(
        num_classes=6,
        channels=32,
        text=dict(
            file='data/text_embeddings/toy_scenes_seen_toyclip.safetensors',
            classes=seen,
            dim=64,
            build=dict(
                vocabulary=seen,
                model='toyclip',
                pretrained=None,
                templates='photo')),
        train_classes=seen,
        test_text=dict(
            type='ClassEmbeddings',
            num_classes=8,
            dim=64,
            file='data/text_embeddings/toy_scenes_toyclip.safetensors',
            classes='toy_scenes',
            build=dict(
                vocabulary='toy_scenes', model='toyclip', templates='photo')),
        decoder=dict(
            channels=32,
            num_queries=16,
            num_layers=3,
            num_heads=4,
            feedforward=64),
        attention_from=2,
        attention_heads=4,
        surgery_blocks=1,
        # Without B, which six classes do not keep from forgetting the others.
        balance=dict(alpha=0.3, beta=1., gamma=0.)))
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1., norm_type=2),
    paramwise_cfg=dict(norm_decay_mult=0.))
val_evaluator = dict(
    type='ZeroShotIoUMetric', iou_metrics=['mIoU'], unseen=['car', 'truck'])
test_evaluator = val_evaluator
