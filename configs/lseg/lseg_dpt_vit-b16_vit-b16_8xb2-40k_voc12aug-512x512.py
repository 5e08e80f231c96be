_base_ = [
    '../_base_/datasets/voc12aug-512x512.py', '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_40k.py', '../_base_/text/vit-b16_voc12.py',
    '../_base_/text/lseg.py'
]
model, optim_wrapper = __import__('mmseg_textkd').stock_network(
    'dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py',
    num_classes=21,
    size=(512, 512))
model['decode_head'].update(
    type='TextDPTHead',
    text=_base_.text_provider.embeddings,
    text_branch=_base_.text_branch)
train_dataloader = dict(batch_size=2)
# No stage 2: the text is fixed. The hook compares its names with the data's.
custom_hooks = [dict(type='PromptLearnerHook')]
