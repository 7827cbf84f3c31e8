"""The page that shows a run: what it holds, and how it is drawn. A pure renderer, with nothing of any run in it."""
