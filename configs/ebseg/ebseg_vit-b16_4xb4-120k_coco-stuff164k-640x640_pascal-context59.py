_base_ = './ebseg_vit-b16_4xb4-120k_coco-stuff164k-640x640.py'
# Only for tools/test.py, with a checkpoint of the config above.
test_dataloader, vocabulary = __import__('mmseg_textkd').open_vocabulary_test(
    '_base_/datasets/pascal_context_59.py',
    scale=(2560, 640),
    vocabulary='voc12')
text_trained = _base_.model.decode_head.text
model = dict(
    decode_head=dict(
        test_text=dict(
            text_trained,
            num_classes=59,
            classes=list(vocabulary),
            file=text_trained.file.replace('coco_stuff', 'pascal_context59'),
            build=dict(text_trained.build, vocabulary=vocabulary))))
# It would compare the test data with the classes of the training.
custom_hooks = []
