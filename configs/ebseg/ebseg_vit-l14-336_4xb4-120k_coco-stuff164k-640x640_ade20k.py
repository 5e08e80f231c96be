_base_ = './ebseg_vit-l14-336_4xb4-120k_coco-stuff164k-640x640.py'
# Only for tools/test.py, with a checkpoint of the config above.
test_dataloader, vocabulary = __import__('mmseg_textkd').open_vocabulary_test(
    '_base_/datasets/ade20k.py', scale=(2560, 640), vocabulary='ade20k')
text_trained = _base_.model.decode_head.text
model = dict(
    decode_head=dict(
        test_text=dict(
            text_trained,
            num_classes=150,
            classes=list(vocabulary),
            file=text_trained.file.replace('coco_stuff', 'ade20k'),
            build=dict(text_trained.build, vocabulary=vocabulary))))
# It would compare the test data with the classes of the training.
custom_hooks = []
