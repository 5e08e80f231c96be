# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .ledger import Ledger, LedgerError
from .plan import Study
from .run import Run
from .study_file import StudyError

__all__ = ['Ledger', 'LedgerError', 'Run', 'Study', 'StudyError']
