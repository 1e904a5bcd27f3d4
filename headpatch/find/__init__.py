"""Finding heads: searches on labelled or unlabelled data, and what they report. One file per finder or calibration.

Nothing here knows an engine: :mod:`headpatch.find.engine` says what is asked of one.
"""
