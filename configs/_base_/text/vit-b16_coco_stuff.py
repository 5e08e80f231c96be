_base_ = './vit-b16_cityscapes.py'
text_provider = dict(
    embeddings=dict(
        file='data/text_embeddings/coco_stuff_vit-b16-openai.safetensors',
        classes='coco_stuff',
        build=dict(vocabulary='coco_stuff')))
