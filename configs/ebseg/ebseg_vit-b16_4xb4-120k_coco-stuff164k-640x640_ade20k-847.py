_base_ = './ebseg_vit-b16_4xb4-120k_coco-stuff164k-640x640.py'
# Only for tools/test.py, with a checkpoint of the config above.
(test_dataloader, test_evaluator,
 tta_pipeline) = __import__('mmseg_textkd').wide_label_test(
     data_root='data/ADE20K_2021_17_01',
     img_path='images_detectron2/validation',
     seg_map_path='annotations_detectron2/validation',
     scale=(2560, 640),
     vocabulary='ade20k_847')
text_trained = _base_.model.decode_head.text
model = dict(
    decode_head=dict(
        test_text=dict(
            text_trained,
            num_classes=847,
            classes='ade20k_847',
            file=text_trained.file.replace('coco_stuff', 'ade20k_847'),
            build=dict(text_trained.build, vocabulary='ade20k_847'))))
# It would compare the test data with the classes of the training.
custom_hooks = []
