_base_ = './ebseg_vit-l14-336_4xb4-120k_coco-stuff164k-640x640.py'
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
            dim=768,
            classes='ade20k_847',
            file='data/text_embeddings/'
            'ade20k_847_vit-l14-336-openai.safetensors',
            build=dict(
                vocabulary='ade20k_847',
                model='ViT-L-14-336',
                pretrained='openai',
                templates='vild'))))
# It would compare the test data with the classes of the training.
custom_hooks = []
