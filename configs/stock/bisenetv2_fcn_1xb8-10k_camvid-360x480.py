_base_ = [
    '../_base_/models/bisenetv2.py', '../_base_/datasets/camvid-360x480.py',
    '../_base_/default_runtime.py', '../_base_/schedules/schedule_10k.py'
]
model = dict(
    data_preprocessor=dict(size=(360, 480)),
    decode_head=dict(num_classes=11),
    auxiliary_head=[
        dict(head, num_classes=11) for head in _base_.model.auxiliary_head
    ])
