"""A dashboard of recorded runs: a store of points and entities, pages about them, and the server that shows them."""
