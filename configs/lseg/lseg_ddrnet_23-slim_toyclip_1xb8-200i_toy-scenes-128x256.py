_base_ = [
    '../_base_/datasets/toy_scenes-128x256.py', '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_200i.py',
    '../_base_/text/toyclip_toy_scenes.py', '../_base_/text/lseg.py'
]
model, optim_wrapper = __import__('mmseg_textkd').stock_network(
    'ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py',
    num_classes=8,
    size=(128, 256))
model['backbone']['init_cfg'] = None  # a toy starts from scratch
model['decode_head'].update(
    type='TextDDRHead',
    text=_base_.text_provider.embeddings,
    text_branch=_base_.text_branch)
# No stage 2: the text is fixed. The hook compares its names with the data's.
custom_hooks = [dict(type='PromptLearnerHook')]
