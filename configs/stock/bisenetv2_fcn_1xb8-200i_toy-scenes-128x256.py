_base_ = [
    '../_base_/models/bisenetv2.py',
    '../_base_/datasets/toy_scenes-128x256.py', '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_200i.py'
]
model = dict(
    data_preprocessor=dict(size=(128, 256)),
    decode_head=dict(num_classes=8),
    auxiliary_head=[
        dict(head, num_classes=8) for head in _base_.model.auxiliary_head
    ])
