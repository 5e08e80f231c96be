# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Text networks as stock networks that predict the same."""
import copy
import re

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmengine.config import Config
from mmengine.runner import Runner, load_checkpoint
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS
from network_tester import CONFIGS, WatchHook, load_model
from tiny import CONTROL
from tiny import run as train
from tiny import save_weights, stir, tiny_config

from mmseg_textkd.deploy import (fold, fold_state_dict, mean_lengths,
                                 to_stock_cfg, verify)
from mmseg_textkd.models.text_parameters import text_providers

SIZE = (64, 96)
KEY = 'decode_head.conv_seg'
SEGNEXT = CONFIGS / ('text_classifier/textkd_segnext_mscan-t_vit-b16_1xb8-10k_'
                     'camvid-360x480.py')


def config(folder, classes=8, dim=16, text=CONTROL, **head):
    """A tiny text network, its text on the auxiliary head too."""
    cfg = tiny_config(folder, dict(text, dim=dim))
    head = cfg.model.decode_head = dict(
        cfg.model.decode_head, num_classes=classes, **head)
    other = dict(channels=8, role='classifier', text_losses=None)
    cfg.model.auxiliary_head = [dict(head, **other)]
    return cfg


def settled(cfg, seed=0):
    """A model whose weights and statistics are those of no start."""
    torch.manual_seed(seed)
    return stir(MODELS.build(cfg.model).eval(), .1)


def logits(model, size=SIZE):
    inputs = torch.randn(1, 3, *size, generator=torch.manual_seed(3))
    inputs = inputs.to(next(model.parameters()))
    with torch.no_grad():
        features = model.extract_feat(inputs)
        heads = [model.decode_head, *getattr(model, 'auxiliary_head', [])]
        return [head(features).float() for head in heads]


def batch_of(count=1):
    images = torch.randint(0, 256, (count, 3, *SIZE), dtype=torch.uint8)
    return dict(inputs=[*images], data_samples=None)


def load_stock(stock_cfg, state):
    stock = MODELS.build(stock_cfg.model).eval()
    stock.load_state_dict(state, strict=True)
    return stock


def assert_near(got, expected, bound=1e-5):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a.shape == b.shape and b.std() > .05
        assert (a - b).abs().max() < bound * b.abs().max()


@each_case('head', [
    dict(),
    dict(classes=5, dim=40),
    dict(text_branch=dict(norm='none')),
    dict(text_branch=dict(bias=False, scale=dict(init=3.))),
    dict(text_losses=[dict(type='TextAlignmentLoss')]),
    dict(text=dict(type='LearnedEmbeddings')),
    dict(role='auxiliary'),
])
def test_stock_model_predicts_the_same(tmp_path, head):
    cfg = config(tmp_path, **head)
    model = settled(cfg)
    model.dataset_meta = dict(classes=('a', ))
    stock = fold(model, cfg)
    for part in (stock.decode_head, *stock.auxiliary_head):
        assert type(part) is FCNHead
    assert not text_providers(stock) and not stock.training
    assert_near(logits(stock), logits(model))
    assert stock.dataset_meta == model.dataset_meta
    assert stock.cfg.to_dict() == to_stock_cfg(cfg).to_dict()
    # Folded again it stays; stripped it only lacks the auxiliary head.
    state, again = stock.state_dict(), fold(stock, stock.cfg).state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[k], again[k]) for k in state)
    stripped = fold(model, cfg, strip_auxiliary=True)
    assert not hasattr(stripped, 'auxiliary_head')
    assert_near(logits(stripped), logits(model)[:1])


def test_weights_equal_those_by_hand(tmp_path):
    model = settled(config(tmp_path))
    head = model.decode_head.conv_seg
    bn, conv = head.projection.bn.double(), head.projection.conv.double()
    features = torch.randn(50, conv.in_channels, dtype=torch.float64)
    middle = (features @ conv.weight.flatten(1).T - bn.running_mean) / (
        bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias
    text = head.text.class_embeddings.double()
    expected = head.scale().double() * middle @ text.T + head.logit_bias
    head.float()
    state = fold_state_dict(model)
    weight = state[f'{KEY}.weight'].double().flatten(1)
    got = features @ weight.T + state[f'{KEY}.bias']
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_vectors_of_any_length(tmp_path):
    """Files are normalized; what a checkpoint holds counts as it is."""
    cfg = config(tmp_path)
    model = settled(cfg)
    expected = fold_state_dict(model)
    provider = model.decode_head.conv_seg.text
    lengths = torch.rand(8, 1) + .5
    vectors = provider.class_embeddings * lengths
    provider.fill(vectors)
    for key, value in fold_state_dict(model).items():
        torch.testing.assert_close(value, expected[key])
    provider.class_embeddings.copy_(vectors)
    folded = fold(model, cfg)
    assert_near(logits(folded), logits(model))
    weight = expected[f'{KEY}.weight'] * lengths[..., None, None]
    torch.testing.assert_close(folded.decode_head.conv_seg.weight.data, weight)


@each_case('dtype', [torch.bfloat16, torch.float64])
def test_weights_of_other_precision(tmp_path, dtype):
    cfg = config(tmp_path)
    model = settled(cfg).to(dtype)
    stock = fold(model, cfg)
    assert {p.dtype for p in stock.parameters()} == {dtype}
    bound = .05 if dtype is torch.bfloat16 else 1e-6
    assert_near(logits(stock), logits(model), bound)


def test_what_is_refused(tmp_path):
    cfg = config(tmp_path)
    model = settled(cfg)
    with pytest.raises(RuntimeError, match='only a model in evaluation mode'):
        fold_state_dict(model.train())
    model.eval().decode_head.conv_seg.train()
    with pytest.raises(RuntimeError, match='needs evaluation mode'):
        fold_state_dict(model)
    model.eval().backbone.bn1.bias.data[0] = float('nan')
    model.decode_head.conv_seg.logit_bias.data[0] = float('inf')
    message = '2 weights have NaN or infinite values.*bone.bn1.bias.*seg.bias'
    with pytest.raises(ValueError, match=message):
        fold_state_dict(model)
    # Text that is not there is missed only where it is deployed.
    for role in ('classifier', 'auxiliary'):
        cfg = config(tmp_path, role=role)
        cfg.model.pop('auxiliary_head')
        cfg.model.decode_head.text = dict(
            type='ClassEmbeddings', file='nowhere', dim=16)
        empty = settled(cfg)
        if role == 'classifier':
            with pytest.raises(RuntimeError, match='embeddings are empty'):
                fold_state_dict(empty)
        else:
            assert_near(logits(fold(empty, cfg)), logits(empty))


@each_case('dim', [8, 16, 17, 40])
def test_l2_norm_is_kept_on_request(tmp_path, dim):
    cfg = config(tmp_path, dim=dim, text_branch=dict(norm='l2'))
    model = settled(cfg)
    message = f"^{KEY} has norm='l2'.*`--l2 keep`.*`--l2 approximate`"
    with pytest.raises(ValueError, match=message):
        fold_state_dict(model)
    state = fold_state_dict(model, keep_l2=True)
    stock = load_stock(to_stock_cfg(cfg, keep_l2=True), state)
    assert type(stock.decode_head) is FCNHead
    assert_near(logits(stock), logits(model))
    # No wider than the features, however wide the text is.
    channels = stock.decode_head.conv_seg.length.out_channels
    assert channels == min(dim, 17)
    again = fold_state_dict(stock)
    assert all(torch.equal(v, again[k]) for k, v in stock.state_dict().items())


@each_case('kind', ['depthwise', 'bottleneck'])
def test_blocks_are_kept_with_the_l2_norm_or_refused(tmp_path, kind):
    branch = dict(norm='l2', regularization=dict(kind=kind, depth=2))
    cfg = config(tmp_path, text_branch=branch)
    model = settled(cfg)
    with torch.no_grad():
        weight = model.decode_head.conv_seg.regularization.weight
        weight.add_(.3 * torch.randn(2, 3, 3))
    for lengths in (None, {KEY: 1.}):
        with pytest.raises(ValueError, match='blocks.*--l2 keep.*keep_l2=Fa'):
            fold_state_dict(model, lengths=lengths)
    stock_cfg = to_stock_cfg(cfg, keep_l2=True)
    state = fold_state_dict(model, keep_l2=True)
    stock = load_stock(stock_cfg, state)
    assert type(stock.decode_head) is FCNHead
    assert_near(logits(stock), logits(model))
    verify(model, stock_cfg, state)

    cfg.model.decode_head.text_branch.norm = 'bn'
    with pytest.raises(ValueError, match="norm='bn' and keep_l2=True"):
        fold_state_dict(settled(cfg), keep_l2=True)


def test_l2_norm_folds_with_one_length_for_all(tmp_path):
    cfg = config(tmp_path, text_branch=dict(norm='l2'))
    model, batch = settled(cfg), batch_of(1)
    before = [len(m._forward_hooks) for m in model.modules()]
    lengths = mean_lengths(model, [batch])
    assert before == [len(m._forward_hooks) for m in model.modules()]
    inputs = model.data_preprocessor(batch)['inputs']
    classifier = model.decode_head.conv_seg
    with torch.no_grad():
        head = model.decode_head
        features = head._forward_feature(model.extract_feat(inputs))
        embeddings = classifier.projection.conv(features)
        length = embeddings.norm(dim=1).mean().item()
        expected = classifier.classify(embeddings / length, classifier.text())
        assert lengths == {KEY: pytest.approx(length, rel=1e-6)}
        with pytest.raises(ValueError, match='auxiliary heads, which do not'):
            fold_state_dict(model, lengths=lengths)
        state = fold_state_dict(model, strip_auxiliary=True, lengths=lengths)
        stock_cfg = to_stock_cfg(cfg, strip_auxiliary=True)
        got = load_stock(stock_cfg, state).decode_head.conv_seg(features)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    # It is no fold, and that is measured.
    report = verify(model, stock_cfg, state, tolerance=None)
    assert all(.01 < a.relative for a in report.agreements)
    with pytest.raises(ValueError, match='does not predict what the trained'):
        verify(model, stock_cfg, state)


def test_report_counts_what_differs(tmp_path):
    cfg = config(tmp_path)
    model, stock_cfg = settled(cfg), to_stock_cfg(cfg)
    state = fold_state_dict(model)
    report = verify(model, stock_cfg, state, [batch_of(2), batch_of(2)])
    expected = {'random 128x256': 128 * 256, 'random 184x312': 184 * 312}
    expected['4 images'] = 4 * 64 * 96
    assert {a.inputs: a.pixels for a in report.agreements} == expected
    # It is short.
    assert re.search(r'folded: \d+ parameters, 0\.\d{4} GFLOPs at 128x256\n',
                     str(report))
    assert str(report).count('\n') == 4
    for agreement in report.agreements:
        assert 0 < agreement.relative < 1e-5 and agreement.max_logit > .1
        assert agreement.share < 1e-3
    stock = MODELS.build(stock_cfg.model).eval()
    costs = report.costs
    assert costs['folded'].params == sum(
        p.numel() for p in stock.parameters()) < costs['as trained'].params
    # The text costs a projection 16 -> 16 and, as before, 16 -> 8.
    pixels = (128 // 4) * (256 // 4)
    more = costs['as trained'].flops - costs['folded'].flops
    assert more == 2 * pixels * 16 * 16

    # A shift of one class by a known amount is what is reported.
    state[f'{KEY}.bias'][2] += .5
    report = verify(model, stock_cfg, state, tolerance=None)
    stock.load_state_dict(state)
    for agreement in report.agreements:
        assert abs(agreement.max_difference - .5) < 1e-4
        assert 0 < agreement.differing < agreement.pixels
    with pytest.raises(ValueError) as error:
        verify(model, stock_cfg, state)
    assert str(report) in str(error.value)
    assert '(tolerance 0.0001, relative)' in str(error.value)
    state[f'{KEY}.bias'][2] = float('nan')
    with pytest.raises(ValueError, match='difference of logits. nan'):
        verify(model, stock_cfg, state)
    state.pop(f'{KEY}.bias')
    with pytest.raises(RuntimeError, match='Missing key'):
        verify(model, stock_cfg, state)


def test_heads_that_draw_random_numbers_are_comparable():
    cfg = Config(dict(model=load_model(SEGNEXT)))
    model = settled(cfg)
    report = verify(model, to_stock_cfg(cfg), fold_state_dict(model))
    assert max(a.relative for a in report.agreements) < 1e-5


@each_case('weights', ['stage1', 'weights'])
@each_case('name', ['plain', 'auxiliary', 'bf16', 'ema'])
def test_trained_networks(trained, name, weights):
    """After each stage, in each role, with bfloat16, with averages."""
    run = trained(name)
    model = MODELS.build(run.cfg.model)
    load_checkpoint(model, str(getattr(run, weights)), strict=True)
    stock = fold(model.eval(), run.cfg)
    assert_near(logits(stock), logits(model))
    started = [p.started.item() for p in text_providers(model).values()]
    assert started == [weights == 'weights']
    if name == 'ema' and weights == 'weights':
        # MMEngine swaps: `state_dict` has the averages, text included.
        averaged = fold_state_dict(run.averaged)
        latest, key = fold_state_dict(run.model), f'{KEY}.weight'
        for k, value in averaged.items():
            assert torch.equal(stock.state_dict()[k], value), k
        assert (averaged[key] - latest[key]).abs().max() > 1e-3
        provider, = text_providers(model).values()
        base = run.model.decode_head.conv_seg.text.base
        expected = F.normalize(base + .5 * provider.offset, dim=1).data
        torch.testing.assert_close(provider.class_embeddings, expected)


def losses(model, batch):
    """All losses of a batch."""
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    found = model.loss(data['inputs'], data['data_samples'])
    return {k: float(v) for k, v in found.items() if 'loss' in k}


def test_third_stage_of_the_guide(trained, tmp_path, monkeypatch):
    """Its config, and that its first loss is the one at the switch."""
    guide = CONFIGS.parent / 'docs/en/user_guides/deploy.md'
    code, = re.findall(r'```python\n(_base_.*?)```', guide.read_text(), re.S)
    base, = re.findall(r"_base_ = '(.*?)'", code)
    path, stage3 = CONFIGS.parent / base, tmp_path / 'stage3.py'
    name = f'textkd_{path.name}'.replace('_1xb8', '_vit-b16_1xb8')
    assert (CONFIGS / 'text_classifier' / name).exists()
    stage3.write_text(code.replace(base, str(path)))
    third, stock = map(Config.fromfile, (stage3, path))
    assert 'custom_imports' in stock
    assert third.model == stock.model
    changed = {k for k in third if third[k] != stock.get(k)}
    expected = 'load_from', 'optim_wrapper', 'param_scheduler', 'train_cfg'
    assert changed == set(expected)
    rate = third.optim_wrapper.optimizer.lr / stock.optim_wrapper.optimizer.lr
    iters = third.train_cfg.max_iters
    assert rate <= .1 and iters < stock.train_cfg.max_iters / 5
    assert third.param_scheduler[0].end == iters
    # Here with the tiny network.
    run = trained()
    model = MODELS.build(run.cfg.model)
    load_checkpoint(model, str(run.weights), strict=True)
    folded = fold_state_dict(model.eval())
    tiny = to_stock_cfg(run.cfg)
    tiny.merge_from_dict({k: third[k] for k in changed})
    tiny.load_from = save_weights(tmp_path / 'out.pth', folded)
    tiny.work_dir = str(tmp_path / 'third')
    tiny.custom_hooks = [dict(type='WatchHook', noise=0.)]
    tiny.train_cfg.max_iters = 2
    loader = Runner.build_dataloader(tiny.train_dataloader, seed=0)
    model.train()
    model.decode_head.conv_seg.projection.bn.eval()
    expected = sum(losses(model, next(iter(loader))).values())
    runner = train(tiny)
    watch, = (h for h in runner.hooks if isinstance(h, WatchHook))
    assert abs(watch.losses[0] - expected) < 1e-4 * expected
    assert watch.losses[1] != watch.losses[0]
