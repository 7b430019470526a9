"""Pictures of a run: what changed, how it went, and what the chain looks like.

grids.py         before/after grids and single pictures (Pillow)
curves.py        training curves from the metrics log (matplotlib, no display needed)
lines.py         a chart of labelled lines (matplotlib)
plan_picture.py  a plan as coloured text (rich) or as PNG (matplotlib)
progress.py      the progress line of a training run and the table at its end (rich)

Import the module that you need: nothing heavy is loaded from here.
"""
