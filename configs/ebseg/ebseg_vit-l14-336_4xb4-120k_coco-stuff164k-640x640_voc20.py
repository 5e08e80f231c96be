_base_ = './ebseg_vit-l14-336_4xb4-120k_coco-stuff164k-640x640.py'
# Only for tools/test.py, with a checkpoint of the config above.
test_dataloader, vocabulary = __import__('mmseg_textkd').open_vocabulary_test(
    '_base_/datasets/pascal_voc12.py',
    scale=(2560, 640),
    leave_out=('background', ),
    vocabulary='voc12')
model = dict(
    decode_head=dict(
        test_text=dict(
            type='ClassEmbeddings',
            classes=list(vocabulary),
            num_classes=20,
            dim=768,
            file='data/text_embeddings/voc20_vit-l14-336-openai.safetensors',
            build=dict(
                vocabulary=vocabulary,
                model='ViT-L-14-336',
                pretrained='openai',
                templates='vild'))))
# It would compare the test data with the classes of the training.
custom_hooks = []
