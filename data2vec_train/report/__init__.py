"""`report.html` of a run: tables, curves, pictures.

Open `pretraining.py` for the order of the sections, `page.py` for how one is drawn.
A new section: a function that returns a `Section` in `page.py`.
"""
