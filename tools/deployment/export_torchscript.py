# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Export a stock network to TorchScript, with the options of export_onnx.py.

torch traces it at one size; whether the trace takes other sizes, `--dynamic`
finds out.
"""
from typing import Optional, Sequence

from export_onnx import complete, parser, run

from mmseg_textkd.deploy.export import to_torchscript


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    arguments = parser(__doc__, '.pt')
    args = complete(arguments, arguments.parse_args(argv), '.pt')
    run(args, to_torchscript)


if __name__ == '__main__':
    main()
