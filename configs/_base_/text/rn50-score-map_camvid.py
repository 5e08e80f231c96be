_base_ = './rn50-score-map_cityscapes.py'
text_fixed = dict(
    file='data/text_embeddings/camvid_rn50-openai-names.safetensors',
    classes='camvid',
    build=dict(
        # The words of TextKD's authors, underscores and all.
        vocabulary=dict(
            _delete_=True,
            sky='Sky',
            building='Building',
            pole='Column_Pole',
            road='Road',
            pavement='Sidewalk',
            tree='Tree',
            signsymbol='SignSymbol',
            fence='Fence',
            car='Car',
            pedestrian='Pedestrian',
            bicyclist='Bicyclist')))
text_learned = dict(embeddings=text_fixed)
