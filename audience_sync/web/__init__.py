"""The dashboard: pages in a browser with the information that the command line prints.

Pages read through `history` and keep no state. `site` has the routes and puts the pages together, `access` decides who
may see and do what, and `render` makes the HTML. Templates and static files are next to the code.
"""
