"""`shortft compare`: methods × rewards × seeds at equal training time, on the same prompts.

Every run is an ordinary `shortft train` in a process of its own. A run is a folder; what is done
is never done again, so that a comparison can be interrupted, continued, and shared by several
processes that were started with the same command.
"""
