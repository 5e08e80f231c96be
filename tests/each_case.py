# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""A list of cases of one kind, in one test."""
import inspect
import sys

import torch


def each_case(names, cases):
    """Run a test for each of a list of cases, as one test.

    Like ``pytest.mark.parametrize``, for long lists of short cases. Each has
    the seed and a ``tmp_path`` of its own; the case that fails is printed.

    Args:
        names (str): Names of the arguments, with commas.
        cases (Iterable): Their values.
    """
    names, cases = [name.strip() for name in names.split(',')], list(cases)
    assert cases

    def decorate(test):
        signature = inspect.signature(test)

        def run(**fixtures):
            root = fixtures.get('tmp_path')
            for number, case in enumerate(cases):
                values = (case, ) if len(names) == 1 else case
                values = dict(zip(names, values, strict=True))
                torch.manual_seed(0)
                if root is not None:
                    fixtures['tmp_path'] = root / f'case{number}'
                    fixtures['tmp_path'].mkdir()
                try:
                    test(**fixtures, **values)
                except BaseException:
                    print(f'in the case {values}', file=sys.stderr)
                    raise

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        run.__module__ = test.__module__
        run.__signature__ = signature.replace(parameters=[
            p for n, p in signature.parameters.items() if n not in names
        ])
        run.pytestmark = getattr(test, 'pytestmark', [])
        return run

    return decorate
