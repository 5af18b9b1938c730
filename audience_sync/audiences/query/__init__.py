"""The query language of definitions: a text becomes a tree, and the tree one SELECT for the database at hand.

parser.py reads a text (grammar.lark is its form) into the tree of tree.py; layout.py and english.py write a tree for
people; compiler.py makes the SELECT from it, with what differs between databases in its dialect modules.
"""
