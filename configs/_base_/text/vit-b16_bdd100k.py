_base_ = './vit-b16_cityscapes.py'
text_provider = dict(
    embeddings=dict(
        file='data/text_embeddings/bdd100k_vit-b16-openai.safetensors',
        classes='bdd100k',
        build=dict(vocabulary='bdd100k')))
