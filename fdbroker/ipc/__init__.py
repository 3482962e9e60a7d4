"""How two processes talk: the wire, the client and the server."""
