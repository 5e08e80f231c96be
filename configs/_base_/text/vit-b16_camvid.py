_base_ = './vit-b16_cityscapes.py'
text_provider = dict(
    embeddings=dict(
        file='data/text_embeddings/camvid_vit-b16-openai.safetensors',
        classes='camvid',
        build=dict(vocabulary='camvid')))
