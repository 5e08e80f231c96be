# Copyright (c) mmseg_textkd contributors. All rights reserved.
