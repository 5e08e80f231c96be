_base_ = './stages.py'
# Stage 1: fixed vectors. Stage 2: a learned offset for every class.
text_provider = dict(
    type='ResidualPromptLearner',
    embeddings=dict(
        type='ClassEmbeddings',
        file='data/text_embeddings/camvid_vit-b16-openai.safetensors',
        classes='camvid',
        dim=512,
        build=dict(
            vocabulary='camvid',
            model='ViT-B-16',
            pretrained='openai',
            templates='vild')))
