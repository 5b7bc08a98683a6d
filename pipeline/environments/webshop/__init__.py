"""WebShop: its catalogue, search, pages and score, and the environment."""
