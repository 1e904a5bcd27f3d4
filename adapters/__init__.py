"""One folder per engine. Adapters supply operands and never name a method; :mod:`headpatch.operands` is the closed list.

Installed as ``headpatch.adapters``. An adapter registers under the entry-point group ``headpatch.adapters`` and decides what
it can patch on type names, so that importing it does not import its engine.
"""
