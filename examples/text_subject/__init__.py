"""A subject of one's own, on text.

``alice.txt`` is Lewis Carroll's *Alice's Adventures in Wonderland* (1865), in the public domain,
after the Millennium Fulcrum Edition 2.9. ``weights.safetensors`` is what ``train.py`` made of it.
"""
