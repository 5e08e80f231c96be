# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The layout changes; what is computed and what is saved does not."""
import torch
from processes import load
from tiny import run, tiny_config
from torch.testing import assert_close


def test_the_same_training_in_another_layout(tmp_path):
    cfg = tiny_config(tmp_path, max_iters=3, save_every=1)
    plain = run(cfg, work_dir=str(tmp_path / 'plain'))
    cfg.custom_hooks = [dict(type='ChannelsLastHook')]
    runner = run(cfg)
    strided = 0
    for name, value in runner.model.state_dict().items():
        assert_close(
            value, plain.model.state_dict()[name], rtol=1e-3, atol=1e-4)
        if value.dim() == 4:
            assert value.is_contiguous(memory_format=torch.channels_last)
            strided += not value.is_contiguous()
    assert strided >= 5
    features = runner.model.backbone(torch.randn(2, 3, 32, 64))
    assert features[0].is_contiguous(memory_format=torch.channels_last)
    assert not features[0].is_contiguous()
    saved = load(f'{cfg.work_dir}/iter_3.pth')['state_dict']
    assert all(value.is_contiguous() for value in saved.values())
    # A run goes on in the layout.
    runner = run(cfg, resume=True, load_from=f'{cfg.work_dir}/iter_1.pth')
    for name, value in runner.model.state_dict().items():
        assert_close(value, saved[name], rtol=1e-3, atol=1e-4)
