# Stage 1 of TextKD as published: the bare names, by the text encoder of CLIP's
# RN50, whose embeddings are as wide as STDC's last feature.
text_fixed = dict(
    type='ClassEmbeddings',
    file='data/text_embeddings/cityscapes_rn50-openai-names.safetensors',
    classes='cityscapes',
    dim=1024,
    build=dict(
        vocabulary=[
            'road', 'sidewalk', 'building', 'wall', 'fence', 'pole',
            'traffic light', 'traffic sign', 'vegetation', 'terrain', 'sky',
            'person', 'rider', 'car', 'truck', 'bus', 'train', 'motorcycle',
            'bicycle'
        ],
        model='RN50',
        pretrained='openai',
        templates='none'))
# Stage 2: 16 tokens, of which 11 are learned vectors of each class.
text_learned = dict(
    type='ContextPromptLearner',
    embeddings=text_fixed,
    model='RN50',
    pretrained='openai',
    context_length=16,
    class_specific=True,
    suffix='')
custom_hooks = [dict(type='PromptLearnerHook')]
