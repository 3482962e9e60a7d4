"""The broker's side: the parts of the server, and the server that composes them."""
