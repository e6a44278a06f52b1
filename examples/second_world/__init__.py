"""What holds on a second world: fashion-ar's figures and defaults, asked again of clipart-ar.

Run it from this folder's parent (or anywhere with that on the PYTHONPATH)::

    python -m second_world --out runs/worlds

Each part is a run of ``kvpolicy ablate``'s kind, in a folder of its own, one cell after the other:
what has finished is kept, and the same command goes on. It writes the figures of the parts that
there are, as JSON and as tables for a page.
"""
