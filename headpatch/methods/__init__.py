"""One file per intervention. A method names operands and never an engine; :mod:`headpatch.methods.base` is the contract."""
