# The words of LSeg's authors: VOC's names where it has the class, and those of
# two words written as one, behind 'others'.
text_words = {
    'motorcycle': 'motorbike',
    'airplane': 'aeroplane',
    'couch': 'sofa',
    'tv': 'tvmonitor'
}
text_provider = dict(
    embeddings=dict(
        type='ClassEmbeddings',
        file='data/text_embeddings/lseg_coco-20i_vit-b32-openai.safetensors',
        classes=__import__(
            'mmseg_textkd').datasets.COCO20iEpisodes.METAINFO['classes'],
        num_classes=81,
        dim=512,
        build=dict(
            vocabulary={
                name: text_words.get(name, name.replace(' ', ''))
                for name in __import__('mmseg_textkd').datasets.
                COCO20iEpisodes.METAINFO['classes']
            },
            model='ViT-B-32',
            pretrained='openai',
            templates='none')))
