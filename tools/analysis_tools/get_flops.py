# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Count FLOPs: MMSegmentation's ``get_flops.py`` and its arguments.

No vectors are needed. A text classifier is counted as it is trained, not
folded.
"""
import torch
from torch import nn

from mmseg_textkd.compat import load_stock_tool
from mmseg_textkd.models.text_parameters import text_providers


def main() -> None:
    """Count as the stock tool does."""
    stock = load_stock_tool('analysis_tools/get_flops.py')
    count = stock.get_model_complexity_info

    def count_with_text(model: nn.Module, *args, inputs, **kwargs) -> dict:
        for provider in text_providers(model).values():
            if not provider.filled:
                # Their values do not matter here.
                provider.fill(torch.ones(provider.num_classes, provider.dim))
        # MMSegmentation 1.2.2 also gives the shape, and MMEngine 0.10.7
        # refuses to be told twice.
        return count(model, inputs=inputs, **kwargs)

    stock.get_model_complexity_info = count_with_text
    stock.main()


if __name__ == '__main__':
    main()
