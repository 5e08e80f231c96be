# For `text.embeddings` of any text head: other words for a class in training,
# its plain name at inference. What is not said here stays as in the fragment
# of the data set: tower, templates, width.
text_synonyms = {
    key:
    dict(
        type='SynonymSampler',
        file=f'data/text_embeddings/{key}_synonyms_vit-b16-openai.safetensors',
        build=dict(vocabulary=f'{key}+synonyms', keep_bank=True))
    for key in ('ade20k', 'bdd100k', 'camvid', 'cityscapes', 'voc12')
}
text_synonyms['toy_scenes'] = dict(
    type='SynonymSampler',
    file='data/text_embeddings/toy_scenes_synonyms_toyclip.safetensors',
    build=dict(vocabulary='toy_scenes+synonyms', keep_bank=True))
