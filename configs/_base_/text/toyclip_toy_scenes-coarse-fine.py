_base_ = './toyclip_toy_scenes.py'
text_provider = dict(
    embeddings=dict(
        classes=None,
        file=[
            'data/text_embeddings/toy_scenes-coarse_toyclip.safetensors',
            'data/text_embeddings/toy_scenes_toyclip.safetensors'
        ],
        build=[
            dict(
                vocabulary=[
                    'sky', 'building', 'road', 'sidewalk', 'pole', 'vehicle',
                    'person'
                ],
                model='toyclip',
                templates='photo'),
            dict(vocabulary='toy_scenes', model='toyclip', templates='photo')
        ]))
