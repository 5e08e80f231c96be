# A frozen CLIP image tower teaches, in training only, through what it has made
# of the regions of the classes: tools/encode_regions.py.
text_regions = dict(
    camvid=dict(
        type='LoadRegionEmbeddings',
        folder='data/region_embeddings/camvid_vit-b16-openai',
        model='ViT-B-16',
        pretrained='openai'),
    toy_scenes=dict(
        type='LoadRegionEmbeddings',
        folder='data/region_embeddings/toy_scenes_toyclip',
        model='toyclip'))
# For `text_losses` of any text head.
text_guided = dict(type='TextGuidedDistillationLoss', loss_weight=10.0)
