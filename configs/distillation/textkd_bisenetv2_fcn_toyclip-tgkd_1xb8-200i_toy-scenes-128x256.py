_base_ = [
    '../text_classifier/textkd_bisenetv2_fcn_toyclip_1xb8-200i_toy-scenes-128x256.py',
    '../_base_/distillation/regions.py'
]
model = dict(decode_head=dict(text_losses=[_base_.text_guided]))
train_dataloader = __import__('mmseg_textkd').add_region_embeddings(
    _base_.train_dataloader, _base_.text_regions['toy_scenes'])
