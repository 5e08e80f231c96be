# The words of LSeg's authors: the names of the folders as they are, behind
# 'others'.
text_provider = dict(
    embeddings=dict(
        type='ClassEmbeddings',
        file='data/text_embeddings/lseg_fss-1000_vit-b32-openai.safetensors',
        classes=__import__(
            'mmseg_textkd').datasets.FSS1000Episodes.METAINFO['classes'],
        num_classes=1001,
        dim=512,
        build=dict(
            vocabulary={
                name: name
                for name in __import__('mmseg_textkd').datasets.
                FSS1000Episodes.METAINFO['classes']
            },
            model='ViT-B-32',
            pretrained='openai',
            templates='none')))
