"""The dashboard: pages that show in a browser what the command line knows.

Pages ask `history` and hold no state of their own; `site` has the routes and puts them together, `access` decides who
may see and do what, and `render` makes the HTML. Templates and static files are beside the code.
"""
