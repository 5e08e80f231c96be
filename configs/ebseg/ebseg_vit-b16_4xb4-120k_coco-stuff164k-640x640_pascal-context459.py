_base_ = './ebseg_vit-b16_4xb4-120k_coco-stuff164k-640x640.py'
# Only for tools/test.py, with a checkpoint of the config above.
(test_dataloader, test_evaluator,
 tta_pipeline) = __import__('mmseg_textkd').wide_label_test(
     data_root='data/pcontext_full',
     img_path='val/image',
     seg_map_path='val/label',
     scale=(2560, 640),
     vocabulary='pascal_context459')
text_trained = _base_.model.decode_head.text
model = dict(
    decode_head=dict(
        test_text=dict(
            text_trained,
            num_classes=459,
            classes='pascal_context459',
            file=text_trained.file.replace('coco_stuff', 'pascal_context459'),
            build=dict(text_trained.build, vocabulary='pascal_context459'))))
# It would compare the test data with the classes of the training.
custom_hooks = []
