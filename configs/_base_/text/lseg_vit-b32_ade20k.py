# The words of LSeg's authors: bare names, of some classes only the first word.
text_words = {
    'bed ': 'bed',
    'chest of drawers': 'chest',
    'pool table': 'pool',
    'screen door': 'screen',
    'coffee table': 'coffee',
    'kitchen island': 'kitchen',
    'swivel chair': 'swivel',
    'arcade machine': 'arcade',
    'television receiver': 'television',
    'dirt track': 'dirt',
    'conveyer belt': 'conveyer',
    'swimming pool': 'swimming',
    'trade name': 'trade',
    'traffic light': 'traffic',
    'crt screen': 'crt',
    'bulletin board': 'bulletin'
}
text_provider = dict(
    embeddings=dict(
        type='ClassEmbeddings',
        file='data/text_embeddings/lseg_ade20k_vit-b32-openai.safetensors',
        classes='ade20k',
        dim=512,
        build=dict(
            vocabulary={
                name: text_words.get(name, name)
                for name in __import__(
                    'mmseg_textkd').text.Vocabulary.from_spec('ade20k').names
            },
            model='ViT-B-32',
            pretrained='openai',
            templates='none')))
