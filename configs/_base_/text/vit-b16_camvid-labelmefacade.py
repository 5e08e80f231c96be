_base_ = './vit-b16_cityscapes.py'
# A file for each data set; equal names get the vector of the first.
text_provider = dict(
    embeddings=dict(
        classes=None,
        file=[
            f'data/text_embeddings/{name}_vit-b16-openai.safetensors'
            for name in ('camvid', 'labelmefacade')
        ],
        build=[
            dict(
                vocabulary=name,
                model='ViT-B-16',
                pretrained='openai',
                templates='vild') for name in ('camvid', 'labelmefacade')
        ]))
