# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Reports of the benchmarks."""
import json
from pathlib import Path
from typing import Any, Iterable, List, Mapping

from ..utils.io import write_files

TIME_HEADER = ('median [quartiles], ms', 'minimum, ms',
               'ratio [95 % interval]')


def time_cells(summary: Mapping[str, Any]) -> List[str]:
    """Format median, quartiles, minimum and ratio as table cells."""
    low, high = summary['ratio_ci95']
    return [
        f'{summary["median_ms"]:.2f} '
        f'[{summary["q1_ms"]:.2f}, {summary["q3_ms"]:.2f}]',
        f'{summary["min_ms"]:.2f}',
        f'{summary["ratio"]:.3f} [{low:.3f}, {high:.3f}]'
    ]


def write_results(results: Mapping[str, Any], page: str,
                  paths: Iterable[Path]) -> None:
    """Print a report and write it or, as .json, the results to files."""
    print(page)
    text = json.dumps(results, indent=2) + '\n'
    write_files({
        path: (text if path.suffix == '.json' else page).encode()
        for path in paths
    })
