# A control: the same head, two stages and schedule, but no language.
_base_ = './textkd_bisenetv2_fcn_vit-b16_1xb8-10k_camvid-360x480.py'
model = dict(
    decode_head=dict(
        text=dict(
            embeddings=dict(
                _delete_=True,
                type='ControlEmbeddings',
                kind='random',
                dim=512))))
