# https://github.com/HKUSTCV/FSS-1000, unpacked into data/FSS-1000.
_base_ = './pascal-5i-episodes-480x480.py'
test_dataloader = dict(
    dataset=dict(
        type='FSS1000Episodes',
        data_root='data/FSS-1000',
        data_prefix=dict(_delete_=True, img_path='')))
