"""How plugins are found, judged and read; `pgen.registry` puts it together.

loader.py    metadata first: which plugins there are, and which may be imported
provided.py  what their hooks return, checked and named
"""
