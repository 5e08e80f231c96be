_base_ = './stages.py'
# Stage 1: fixed vectors. Stage 2: a learned offset for every class.
text_provider = dict(
    type='ResidualPromptLearner',
    embeddings=dict(
        type='ClassEmbeddings',
        file='data/text_embeddings/cityscapes_vit-b16-openai.safetensors',
        classes='cityscapes',
        dim=512,
        build=dict(
            vocabulary='cityscapes',
            model='ViT-B-16',
            pretrained='openai',
            templates='vild')))
