_base_ = './stages.py'
# Stage 1: fixed vectors of ToyCLIP, a toy that comes with the package.
# Stage 2: context vectors learned through its frozen text tower.
text_provider = dict(
    type='ContextPromptLearner',
    model='toyclip',
    token_dim=64,
    n_ctx=4,
    init='a photo of a',
    embeddings=dict(
        type='ClassEmbeddings',
        file='data/text_embeddings/toy_scenes_toyclip.safetensors',
        classes='toy_scenes',
        dim=64,
        build=dict(
            vocabulary='toy_scenes', model='toyclip', templates='photo')))
