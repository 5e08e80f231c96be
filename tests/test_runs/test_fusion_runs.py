# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Image and text meet in real, tiny runs, up to the deployed network."""
import json
from types import SimpleNamespace

import pytest
import torch
from each_case import each_case
from mmseg.models.decode_heads import FCNHead
from processes import states
from tiny import (RESIDUAL, SIZE, assert_equal, changed, folded,
                  predict_logits, run, tiny_config, without_loops)
from tool_modules import load_tool

from mmseg_textkd.deploy import fold_state_dict, to_stock_cfg
from mmseg_textkd.models.text_parameters import text_parameters

pytestmark = pytest.mark.stacks

deploy = load_tool('deployment/deploy.py')
textkd2mmseg = load_tool('model_converters/textkd2mmseg.py')
ITERS, SWITCH = 6, 3
BRIDGE = dict(type='TwoWayBridge', width=8, num_heads=2)
# Without dropout, which is random: MMEngine does not save random states.
CONTEXT = dict(type='ContextAwareText', width=8, num_heads=2, dropout=0.)
# Fusion, role of the head, and what is in the log.
RUNS = dict(
    bridge=(BRIDGE, 'classifier', {'bridge_ce', 'bridge_kl'}),
    bridge_aux=(BRIDGE, 'auxiliary', {'bridge_ce', 'bridge_kl'}),
    kept=(dict(BRIDGE, num_blocks=1, use='inference'), 'classifier', set()),
    context=(CONTEXT, 'classifier', {'context_ce'}))


def config(folder, fusion, role='classifier', learn=None):
    cfg = tiny_config(
        folder, RESIDUAL, dict(switch_at=SWITCH, learn=learn), max_iters=ITERS)
    cfg.model.decode_head.update(fusion=fusion, role=role)
    cfg.optim_wrapper.type = 'CPUAmpOptimWrapper'
    cfg.optim_wrapper.optimizer.lr = .2
    cfg.default_hooks.checkpoint.interval = 1
    test = {k: v for k, v in cfg.items() if k.startswith('test')}
    without_loops(cfg)
    cfg.update(test)
    return cfg


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Get a function that gives one of the ``RUNS``, made when asked for."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            cfg = config(folder, *RUNS[name][:2])
            model = run(cfg).model.eval()
            cfg.dump(folder / 'config.py')
            lines, = (folder / 'work').glob('*/vis_data/scalars.json')
            made[name] = SimpleNamespace(
                work=folder / 'work',
                files=[f'{folder}/config.py', f'{folder}/work/iter_6.pth'],
                cfg=cfg,
                model=model,
                log=list(map(json.loads,
                             lines.read_text().splitlines())),
                states=states(folder / 'work', *range(1, ITERS + 1)))
        return made[name]

    return get


@each_case('name', RUNS)
def test_two_stages_in_mixed_precision(trained, name):
    done = trained(name)
    params = dict(done.model.named_parameters())
    fusion = {n for n in params if '.fusion.' in n}
    # Gates first, then everything.
    learned = changed(done.states[1], done.states[SWITCH - 1])
    assert fusion and fusion <= learned
    # In stage 2 prompts, scales and biases, through the bridge or not.
    learned = changed(done.states[SWITCH - 1], done.states[-1])
    assert learned & set(params) == set(text_parameters(done.model))
    assert any(n.endswith('text.offset') for n in learned)
    assert not any('.fusion.' in n for n in learned)
    assert all(v.isfinite().all() for v in done.states[-1].values())
    rows = [r for r in done.log if 'loss' in r]
    assert len(rows) == ITERS
    for row in rows:
        losses = {k: v for k, v in row.items() if k[:12] == 'decode.loss_'}
        found = {k[12:] for k in losses if 'bridge' in k or 'context' in k}
        assert found == RUNS[name][2]
        assert row['loss'] == pytest.approx(sum(losses.values()), rel=1e-3)


@each_case('name', ['bridge', 'context'])
def test_a_killed_run_goes_on_as_the_other(trained, name):
    done = trained(name)
    cfg = done.cfg.copy()
    cfg.work_dir = str(done.work.parent / 'resumed')
    # Between two iterations of stage 1: with gates that have moved.
    cfg.load_from, cfg.resume = str(done.work / 'iter_2.pth'), True
    # The batches of an endless sampler are passed over one by one.
    again = run(cfg).model.state_dict()
    assert_equal(dict(again), dict(done.states[-1]))


@each_case('name', ['bridge', 'bridge_aux', 'context'])
def test_deployed_network_is_a_stock_one(trained, name):
    done = trained(name)
    stock = folded(done.cfg, done.model)
    assert type(stock.decode_head) is FCNHead
    assert not any('fusion' in n for n, _ in stock.named_modules())
    inputs = torch.randn(1, 3, *SIZE)
    calls = []
    done.model.decode_head.text_branch.fusion.register_forward_hook(
        lambda *args: calls.append(1))
    with torch.no_grad():
        expected, got = done.model(inputs), stock(inputs)
    bound = 1e-5 * expected.abs().max().item()
    assert (got - expected).abs().max() < bound and expected.std() > .01
    assert not calls


def test_a_kept_bridge_does_not_fold_and_is_told_so(trained, tmp_path):
    done = trained('kept')
    classifier = done.model.decode_head.text_branch
    for refuse in (lambda: fold_state_dict(done.model), classifier.as_conv,
                   lambda: to_stock_cfg(done.cfg)):
        with pytest.raises(ValueError) as error:
            refuse()
        message = str(error.value)
        assert 'TwoWayBridge' in message and "use='inference'" in message
        assert 'deploy.py' in message and "use='training'" in message
    out = tmp_path / 'out.pth'
    with pytest.raises(SystemExit, match='does not fold'):
        textkd2mmseg.main([*done.files, str(out)])
    assert not out.exists()


def test_a_kept_bridge_runs_in_onnx_runtime(trained, tmp_path, capsys):
    done = trained('kept')
    gates = done.states[-1]['decode_head.conv_seg.fusion.pixel_gate']
    assert gates.abs().max() > 1e-4
    # The tool compares the graph with PyTorch, or writes nothing.
    words = ['--to', 'onnx', '--dynamic', '--no-preprocess', '--out']
    deploy.main([*done.files, *words, str(tmp_path / 'kept')])
    said = capsys.readouterr().out
    assert said.count('another class at 0 of') == 2
    import onnxruntime
    session = onnxruntime.InferenceSession(f'{tmp_path}/kept/model.onnx')
    fusion = done.model.decode_head.text_branch.fusion
    for size in (SIZE, (48, 80)):
        inputs = torch.randn(1, 3, *size)
        expected = predict_logits(done.model, inputs)
        got, = session.run(None, dict(image=inputs.numpy()))
        got = torch.from_numpy(got)
        bound = 1e-4 * max(1., expected.abs().max().item())
        assert (got - expected).abs().max() < bound
        # Not what the plain classifier would say.
        fusion.use = 'training'
        plain = predict_logits(done.model, inputs)
        fusion.use = 'inference'
        assert (plain - expected).abs().max() > 10 * bound


def test_a_kept_bridge_can_learn_in_stage_2(tmp_path):
    learn = {r'\.text\.': 1., r'\.fusion\.': .5}
    cfg = config(tmp_path, RUNS['kept'][0], learn=learn)
    model = run(cfg).model
    learned = changed(*states(tmp_path / 'work', SWITCH, ITERS))
    learned &= set(dict(model.named_parameters()))
    fusion = {n for n, _ in model.named_parameters() if '.fusion.' in n}
    assert learned == fusion | {'decode_head.conv_seg.text.offset'}
