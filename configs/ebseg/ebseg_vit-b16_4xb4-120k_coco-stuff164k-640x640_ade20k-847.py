_base_ = './ebseg_vit-b16_4xb4-120k_coco-stuff164k-640x640.py'
# Only for tools/test.py, with a checkpoint of the config above.
(test_dataloader, test_evaluator,
 tta_pipeline) = __import__('mmseg_textkd').wide_label_test(
     data_root='data/ADE20K_2021_17_01',
     img_path='images_detectron2/validation',
     seg_map_path='annotations_detectron2/validation',
     scale=(2560, 640),
     vocabulary='ade20k_847')
model = dict(
    decode_head=dict(
        test_text=dict(
            type='ClassEmbeddings',
            num_classes=847,
            dim=512,
            classes='ade20k_847',
            file='data/text_embeddings/'
            'ade20k_847_vit-b16-openai.safetensors',
            build=dict(
                vocabulary='ade20k_847',
                model='ViT-B-16',
                pretrained='openai',
                templates='vild'))))
# It would compare the test data with the classes of the training.
custom_hooks = []
