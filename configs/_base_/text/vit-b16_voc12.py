_base_ = './vit-b16_cityscapes.py'
text_provider = dict(
    embeddings=dict(
        file='data/text_embeddings/voc12_vit-b16-openai.safetensors',
        classes='voc12',
        build=dict(vocabulary='voc12')))
