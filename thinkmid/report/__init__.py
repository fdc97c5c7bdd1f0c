"""Run folders -> one self-contained HTML page and its pictures: `python -m thinkmid.report RUN ...`."""
