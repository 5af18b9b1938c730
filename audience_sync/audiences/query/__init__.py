"""The query language of definitions: a query is parsed into a tree, and the tree is compiled into one SELECT.

parser.py parses a text (grammar.lark has the syntax) into the tree of tree.py. layout.py and english.py write a tree as
a query and as a sentence. compiler.py compiles it; on_sqlite.py and on_postgresql.py have what differs between databases.
"""
