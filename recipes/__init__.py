"""Shipped recipes, one folder per model. Installed as ``headpatch.recipes``; :func:`headpatch.list_recipes` names them."""
