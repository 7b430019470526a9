"""Pictures of a run: what changed, how it went, and what the chain looks like.

grids.py         before/after grids and single pictures (Pillow)
curves.py        training curves from the metrics log (matplotlib, no display needed)
lines.py         a chart of labelled lines (matplotlib)
plan_text.py     a plan as coloured text (rich)
plan_picture.py  the same as PNG (matplotlib)
progress.py      the progress line of a training run and the table at its end (rich)
text.py          fonts and lines that wrap, for grids.py
files.py         files that are whole or not there

Import the module that you need: nothing heavy is loaded from here.
"""
