# CLIP's image tower, frozen, tells in training what it sees at each patch of
# the images; it is asked for no class.
text_clip_teachers = dict(
    camvid=dict(
        type='FrozenCLIPTeacher',
        model='ViT-B-16',
        pretrained='openai',
        scale=1.0),
    toy_scenes=dict(
        type='FrozenCLIPTeacher',
        model='toyclip',
        embed_dims=64,
        num_layers=3,
        patch_size=8,
        grid_size=4,
        out_dims=64,
        scale=1.0,
        surgery_blocks=1))
# For `text_branch`: the classifier that learns of it. The exponents are
# EBSeg's for ViT-B/16 without those of its third embedding.
text_balance = dict(alpha=0.3, beta=1.0)
text_balanced = dict(
    camvid=dict(
        type='BalancedTextClassifier', balance=text_balance, clip_scale=100.0),
    # ToyCLIP's own factor on cosines.
    toy_scenes=dict(
        type='BalancedTextClassifier', balance=text_balance, clip_scale=15.88))
# For `text_losses`.
text_from_clip = [
    dict(type='ImageEmbeddingDistillationLoss', loss_weight=10.0)
]
text_clip_hooks = [dict(type='PromptLearnerHook'), dict(type='TeacherHook')]
