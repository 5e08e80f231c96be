# The head of LSeg, in front of fixed text: cosines, the released scale, which
# is not learned, and the two bottleneck blocks that were best in its ablation.
text_branch = dict(
    norm='l2',
    bias=False,
    scale=dict(init=1 / 0.07, learnable=False),
    regularization=dict(kind='bottleneck', depth=2, activation='lrelu'))
