# The stock classifier stays; text only trains, beside it.
_base_ = './textkd_bisenetv2_fcn_vit-b16_1xb8-10k_camvid-360x480.py'
model = dict(decode_head=dict(role='auxiliary'))
# With the network frozen, stage 2 would change nothing that is deployed.
custom_hooks = [
    dict(
        type='PromptLearnerHook',
        switch_at=0.9,
        learn={
            r'\.text\.': 1.0,
            'log_scale': 1.0,
            '.': 0.1
        },
        schedule=dict(type='cosine'))
]
