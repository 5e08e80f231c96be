# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .ledger import Ledger, LedgerError
from .plan import Run, Study, StudyError

__all__ = ['Ledger', 'LedgerError', 'Run', 'Study', 'StudyError']
