# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Export a stock network to TorchScript, with the options of export_onnx.py.

torch traces it at one size; whether the trace takes other sizes, `--dynamic`
finds out.
"""
import argparse
from typing import Optional, Sequence

from export_options import complete, parser


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    return complete(parser(__doc__, '.pt'), argv, '.pt')


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

from export_onnx import run

from mmseg_textkd.deploy.export import to_torchscript


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    run(parse_args(argv), to_torchscript)


if __name__ == '__main__':
    main()
