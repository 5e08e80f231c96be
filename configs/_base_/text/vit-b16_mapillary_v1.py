_base_ = './vit-b16_cityscapes.py'
text_provider = dict(
    embeddings=dict(
        file='data/text_embeddings/mapillary_v1_vit-b16-openai.safetensors',
        classes='mapillary_v1',
        build=dict(vocabulary='mapillary_v1')))
