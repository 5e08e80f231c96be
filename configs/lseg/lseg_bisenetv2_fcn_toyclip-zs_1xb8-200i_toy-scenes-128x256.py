_base_ = [
    './lseg_bisenetv2_fcn_toyclip_1xb8-200i_toy-scenes-128x256.py',
    '../_base_/zero_shot/toy_scenes.py'
]
text_hidden, train_dataloader, val_evaluator = __import__(
    'mmseg_textkd').zero_shot(
        _base_.train_dataloader,
        vocabulary='toy_scenes',
        unseen=_base_.text_unseen,
        before='RandomFlip')
model = dict(decode_head=dict(text_branch=text_hidden))
test_evaluator = val_evaluator
