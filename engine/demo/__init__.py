"""Small worlds that run on a laptop CPU: data and model are made on the spot."""
