# A trained segmentation network teaches, in training only. Another one:
# --cfg-options model.teacher.config=CONFIG model.teacher.checkpoint=PATH
text_teachers = dict(
    camvid=dict(
        config='{{fileDirname}}/../../stock/'
        'ddrnet_23_in1k-pre_1xb8-10k_camvid-360x480.py',
        checkpoint='work_dirs/ddrnet_23_in1k-pre_1xb8-10k_camvid-360x480/'
        'iter_10000.pth'),
    # Released, and found in a clone.
    efficientnet=dict(
        config='{{fileDirname}}/../../stock/efficientnet-lite0_in1k-pre_'
        'segformer_1xb8-1600i_camvid-360x480.py',
        checkpoint='{{fileDirname}}/../../../model_zoo/efficientnet-lite0_'
        'in1k-pre_segformer_1xb8-1600i_camvid-360x480_20261130_093344-'
        'fa72e23b.pth'),
    toy_scenes=dict(
        config='{{fileDirname}}/../../text_classifier/'
        'textkd_bisenetv2_fcn_toyclip_1xb8-200i_toy-scenes-128x256.py',
        checkpoint='work_dirs/'
        'textkd_bisenetv2_fcn_toyclip_1xb8-200i_toy-scenes-128x256/'
        'iter_200.pth'))
text_teacher_hooks = [dict(type='TeacherHook')]
# For `text_losses` of any text head: prototypes and pixel-text similarities.
text_from_segmentor = [
    dict(
        type='TextGuidedDistillationLoss',
        teacher='segmentor',
        loss_weight=10.0),
    dict(type='TextSimilarityDistillationLoss', loss_weight=1.0)
]
# For `distill_losses` of any student, with text or without.
text_peers = dict(
    kd=[dict(type='LogitDistillationLoss', temperature=4.0, loss_weight=1.0)],
    cwd=[
        dict(
            type='ChannelWiseDistillationLoss',
            temperature=4.0,
            loss_weight=3.0)
    ])
