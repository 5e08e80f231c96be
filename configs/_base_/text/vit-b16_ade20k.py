_base_ = './vit-b16_cityscapes.py'
text_provider = dict(
    embeddings=dict(
        file='data/text_embeddings/ade20k_vit-b16-openai.safetensors',
        classes='ade20k',
        build=dict(vocabulary='ade20k')))
