# The words of LSeg's authors: VOC's names as they are, behind 'others'.
text_provider = dict(
    embeddings=dict(
        type='ClassEmbeddings',
        file='data/text_embeddings/lseg_pascal-5i_vit-b32-openai.safetensors',
        classes=__import__(
            'mmseg_textkd').datasets.PASCAL5iEpisodes.METAINFO['classes'],
        num_classes=21,
        dim=512,
        build=dict(
            vocabulary={
                name: name
                for name in __import__('mmseg_textkd').datasets.
                PASCAL5iEpisodes.METAINFO['classes']
            },
            model='ViT-B-32',
            pretrained='openai',
            templates='none')))
